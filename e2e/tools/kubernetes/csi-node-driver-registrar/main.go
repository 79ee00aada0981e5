// Command csi-node-driver-registrar registers a CSI driver with kubelet.
//
// It stands in for the sidecar of that name in the cluster of the end-to-end tests, where no image can be
// pulled: the same flags, the same socket, the same answers, so that the chart's default can be tested.
package main

import (
	"context"
	"errors"
	"flag"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"clip-csi/e2e/tools/kubernetes/csisocket"
)

type server struct {
	registration.UnimplementedRegistrationServer
	driver, endpoint string
}

func (s *server) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	klog.InfoS("Kubelet asks who this is", "driver", s.driver)
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: s.driver, Endpoint: s.endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

func (s *server) NotifyRegistrationStatus(_ context.Context, status *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if !status.GetPluginRegistered() {
		// A restart of the container is the way to try again.
		klog.ErrorS(nil, "Kubelet did not register the driver", "reason", status.GetError())
		klog.FlushAndExit(klog.ExitFlushTimeout, 1)
	}
	klog.InfoS("Kubelet has registered the driver")
	return &registration.RegistrationStatusResponse{}, nil
}

func fail(err error, what string) {
	klog.ErrorS(err, what)
	klog.FlushAndExit(klog.ExitFlushTimeout, 1)
}

func main() {
	klog.InitFlags(nil)
	csiAddress := flag.String("csi-address", "/run/csi/socket", "the driver's socket, as this container sees it")
	kubeletPath := flag.String("kubelet-registration-path", "", "the driver's socket, as kubelet sees it")
	directory := flag.String("plugin-registration-path", "/registration", "kubelet's directory of plugin sockets")
	httpEndpoint := flag.String("http-endpoint", "", "address of /healthz; none if empty")
	timeout := flag.Duration("timeout", time.Second, "for a call to the driver")
	flag.Parse()
	if *kubeletPath == "" {
		fail(nil, "--kubelet-registration-path is required")
	}

	conn, err := csisocket.Connect(*csiAddress)
	if err != nil {
		fail(err, "The driver's socket cannot be used")
	}
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	driver, err := csisocket.DriverName(ctx, conn)
	cancel()
	if err != nil {
		fail(err, "The driver did not say its name")
	}

	socket := filepath.Join(*directory, driver+"-reg.sock")
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		fail(err, "An old socket is in the way")
	}
	syscall.Umask(0o077)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		fail(err, "Cannot listen for kubelet")
	}
	grpcServer := grpc.NewServer()
	registration.RegisterRegistrationServer(grpcServer, &server{driver: driver, endpoint: *kubeletPath})
	if *httpEndpoint != "" {
		http.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
			if _, err := os.Stat(socket); err != nil {
				http.Error(w, "registration socket does not exist", http.StatusNotFound)
				return
			}
			_, _ = w.Write([]byte("ok"))
		})
		go func() { fail(http.ListenAndServe(*httpEndpoint, nil), "Cannot serve /healthz") }()
	}

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-stop
		// The listener removes its socket, by which kubelet knows that the driver is gone.
		grpcServer.Stop()
	}()
	klog.InfoS("Waiting for kubelet", "driver", driver, "socket", socket)
	if err := grpcServer.Serve(listener); err != nil {
		fail(err, "Serving ended")
	}
}
