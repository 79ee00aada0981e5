// Package csisocket connects the stand-ins for the CSI sidecars with the driver's socket.
package csisocket

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Connect makes a connection that waits for the socket when it is used.
func Connect(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
}

// DriverName asks the driver what it is called.
func DriverName(ctx context.Context, conn *grpc.ClientConn) (string, error) {
	info, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return "", fmt.Errorf("GetPluginInfo: %w", err)
	}
	if info.GetName() == "" {
		return "", fmt.Errorf("GetPluginInfo: the driver has no name")
	}
	return info.GetName(), nil
}
