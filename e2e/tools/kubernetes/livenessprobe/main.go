// Command livenessprobe tells kubelet over HTTP what a CSI driver answers to Probe.
//
// It stands in for the sidecar of that name in the cluster of the end-to-end tests, where no image can be
// pulled: the same flags and the same answers.
package main

import (
	"context"
	"flag"
	"net/http"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"clip-csi/e2e/tools/kubernetes/csisocket"
)

func main() {
	klog.InitFlags(nil)
	csiAddress := flag.String("csi-address", "/run/csi/socket", "the driver's socket")
	httpEndpoint := flag.String("http-endpoint", ":9808", "address of /healthz")
	probeTimeout := flag.Duration("probe-timeout", time.Second, "for a Probe")
	flag.Parse()

	conn, err := csisocket.Connect(*csiAddress)
	if err == nil {
		// Until the driver answers there is nothing to serve: connections are refused, and kubelet waits.
		_, err = csisocket.DriverName(context.Background(), conn)
	}
	if err != nil {
		klog.ErrorS(err, "The driver did not say its name")
		klog.FlushAndExit(klog.ExitFlushTimeout, 1)
	}
	http.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), *probeTimeout)
		defer cancel()
		reply, err := csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{})
		switch {
		case err != nil:
			klog.ErrorS(err, "Probe failed")
			http.Error(w, err.Error(), http.StatusInternalServerError)
		// No answer to "ready" means ready, as CSI has it.
		case reply.GetReady() != nil && !reply.GetReady().GetValue():
			http.Error(w, "driver responded but is not ready", http.StatusInternalServerError)
		default:
			_, _ = w.Write([]byte("ok"))
		}
	})
	klog.InfoS("Serving /healthz", "address", *httpEndpoint)
	klog.ErrorS(http.ListenAndServe(*httpEndpoint, nil), "Cannot serve /healthz")
	klog.FlushAndExit(klog.ExitFlushTimeout, 1)
}
