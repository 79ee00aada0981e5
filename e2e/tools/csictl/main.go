// Command csictl is a small CSI client: it calls one RPC of a driver over its Unix socket and
// prints one line, "CODE<TAB>MILLISECONDS<TAB>MESSAGE". It exits with 0 for OK, with 1 for any other
// gRPC code, with 2 for a wrong command line.
//
// It sends what kubelet sends for an inline volume of a pod: the pod's name and namespace as volume
// context, SINGLE_NODE_WRITER as access mode, and no directory at the target path.
package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

const usage = `usage: csictl [--endpoint unix://PATH] [--timeout DURATION] COMMAND
  publish ID TARGET [KEY=VALUE]... [--secret KEY=VALUE]... [--writable] [--mode MODE] [--block] [--bare] [--no-capability]
  unpublish ID TARGET
  stats ID PATH
  info | plugin-caps | probe | caps | node-info
The endpoint may also be given as CSI_ENDPOINT. Kubelet's limit of two minutes is the default timeout.
--bare leaves out the pod's name that kubelet adds, as for a volume that is not inline; --block asks for a block device;
--mode is an access mode as the CSI specification spells it.`

// kubeletTimeout is what kubelet grants a CSI call (pkg/volume/csi: csiTimeout).
const kubeletTimeout = 2 * time.Minute

type options struct {
	endpoint     string
	timeout      time.Duration
	secrets      map[string]string
	writable     bool
	mode         csi.VolumeCapability_AccessMode_Mode
	block        bool
	bare         bool
	noCapability bool
	positional   []string
}

func main() {
	opts, err := parse(os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "csictl: %v\n%s\n", err, usage)
		os.Exit(2)
	}
	connection, err := grpc.NewClient(opts.endpoint,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"))
	if err != nil {
		fmt.Fprintf(os.Stderr, "csictl: %v\n", err)
		os.Exit(2)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), opts.timeout)
	defer cancel()
	call, err := command(opts, connection)
	if err != nil {
		fmt.Fprintf(os.Stderr, "csictl: %v\n%s\n", err, usage)
		os.Exit(2)
	}
	begin := time.Now()
	reply, err := call(ctx)
	elapsed := float64(time.Since(begin).Microseconds()) / 1000
	message := status.Convert(err).Message()
	if err == nil && reply != nil {
		text, _ := protojson.Marshal(reply)
		message = string(text)
	}
	fmt.Printf("%s\t%.1f\t%s\n", name(status.Code(err)), elapsed, strings.ReplaceAll(message, "\n", "\\n"))
	if err != nil {
		os.Exit(1)
	}
}

// name gives a code as gRPC's documents and the driver's metrics write it: INVALID_ARGUMENT.
func name(code codes.Code) string {
	var b strings.Builder
	for i, r := range code.String() {
		if i > 0 && r >= 'A' && r <= 'Z' && code != codes.OK {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return strings.ToUpper(b.String())
}

func parse(args []string) (*options, error) {
	opts := &options{
		endpoint: os.Getenv("CSI_ENDPOINT"),
		timeout:  kubeletTimeout,
		secrets:  map[string]string{},
		mode:     csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
	}
	for i := 0; i < len(args); i++ {
		value := func() (string, error) {
			i++
			if i >= len(args) {
				return "", fmt.Errorf("%s needs a value", args[i-1])
			}
			return args[i], nil
		}
		switch args[i] {
		case "--endpoint":
			v, err := value()
			if err != nil {
				return nil, err
			}
			opts.endpoint = v
		case "--timeout":
			v, err := value()
			if err != nil {
				return nil, err
			}
			if opts.timeout, err = time.ParseDuration(v); err != nil {
				return nil, err
			}
		case "--secret":
			v, err := value()
			if err != nil {
				return nil, err
			}
			key, secret, found := strings.Cut(v, "=")
			if !found {
				return nil, fmt.Errorf("--secret wants KEY=VALUE")
			}
			opts.secrets[key] = secret
		case "--mode":
			v, err := value()
			if err != nil {
				return nil, err
			}
			mode, known := csi.VolumeCapability_AccessMode_Mode_value[v]
			if !known {
				return nil, fmt.Errorf("unknown access mode %s", v)
			}
			opts.mode = csi.VolumeCapability_AccessMode_Mode(mode)
		case "--writable":
			opts.writable = true
		case "--block":
			opts.block = true
		case "--bare":
			opts.bare = true
		case "--no-capability":
			opts.noCapability = true
		default:
			if strings.HasPrefix(args[i], "--") {
				return nil, fmt.Errorf("unknown option %s", args[i])
			}
			opts.positional = append(opts.positional, args[i])
		}
	}
	if len(opts.positional) == 0 {
		return nil, fmt.Errorf("no command")
	}
	if opts.endpoint == "" {
		return nil, fmt.Errorf("no endpoint")
	}
	return opts, nil
}

type call func(context.Context) (proto.Message, error)

func command(opts *options, connection *grpc.ClientConn) (call, error) {
	node := csi.NewNodeClient(connection)
	identity := csi.NewIdentityClient(connection)
	args := opts.positional[1:]
	wants := func(n int) error {
		if len(args) != n {
			return fmt.Errorf("%s wants %d arguments", opts.positional[0], n)
		}
		return nil
	}
	switch opts.positional[0] {
	case "publish":
		if len(args) < 2 {
			return nil, fmt.Errorf("publish wants ID and TARGET")
		}
		request, err := publishRequest(opts, args)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context) (proto.Message, error) {
			_, err := node.NodePublishVolume(ctx, request)
			return nil, err
		}, nil
	case "unpublish":
		if err := wants(2); err != nil {
			return nil, err
		}
		return func(ctx context.Context) (proto.Message, error) {
			_, err := node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: args[0], TargetPath: args[1]})
			return nil, err
		}, nil
	case "stats":
		if err := wants(2); err != nil {
			return nil, err
		}
		return func(ctx context.Context) (proto.Message, error) {
			return node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: args[0], VolumePath: args[1]})
		}, nil
	}
	if err := wants(0); err != nil {
		return nil, err
	}
	switch opts.positional[0] {
	case "info":
		return func(ctx context.Context) (proto.Message, error) {
			return identity.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
		}, nil
	case "plugin-caps":
		return func(ctx context.Context) (proto.Message, error) {
			return identity.GetPluginCapabilities(ctx, &csi.GetPluginCapabilitiesRequest{})
		}, nil
	case "probe":
		return func(ctx context.Context) (proto.Message, error) {
			return identity.Probe(ctx, &csi.ProbeRequest{})
		}, nil
	case "caps":
		return func(ctx context.Context) (proto.Message, error) {
			return node.NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
		}, nil
	case "node-info":
		return func(ctx context.Context) (proto.Message, error) {
			return node.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
		}, nil
	}
	return nil, fmt.Errorf("unknown command %s", opts.positional[0])
}

func publishRequest(opts *options, args []string) (*csi.NodePublishVolumeRequest, error) {
	attributes := map[string]string{}
	if !opts.bare {
		attributes = map[string]string{
			"csi.storage.k8s.io/pod.name":            "e2e",
			"csi.storage.k8s.io/pod.namespace":       "default",
			"csi.storage.k8s.io/pod.uid":             "00000000-0000-4000-8000-000000000000",
			"csi.storage.k8s.io/serviceAccount.name": "default",
			"csi.storage.k8s.io/ephemeral":           "true",
		}
	}
	for _, pair := range args[2:] {
		key, value, found := strings.Cut(pair, "=")
		if !found {
			return nil, fmt.Errorf("%q is not KEY=VALUE", pair)
		}
		attributes[key] = value
	}
	request := &csi.NodePublishVolumeRequest{
		VolumeId:      args[0],
		TargetPath:    args[1],
		VolumeContext: attributes,
		Secrets:       opts.secrets,
		Readonly:      !opts.writable,
	}
	if opts.noCapability {
		return request, nil
	}
	request.VolumeCapability = &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: opts.mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
	}
	if opts.block {
		request.VolumeCapability.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	}
	return request, nil
}
