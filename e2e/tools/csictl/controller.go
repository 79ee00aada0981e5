package main

import (
	"context"
	"fmt"
	"net"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
)

// controller hands out volumes of one image. csi-sanity needs it: its Node specs that publish a
// volume take one from CreateVolume, which a node-only driver does not have.
type controller struct {
	csi.UnimplementedControllerServer
	image string
}

func (c controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return &csi.ControllerGetCapabilitiesResponse{}, nil
}

func (c controller) CreateVolume(_ context.Context, request *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	volume := &csi.Volume{VolumeId: request.GetName(), VolumeContext: map[string]string{"image": c.image}}
	return &csi.CreateVolumeResponse{Volume: volume}, nil
}

func (c controller) DeleteVolume(context.Context, *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return &csi.DeleteVolumeResponse{}, nil
}

// serveController serves until it is killed.
func serveController(socket, image string) error {
	_ = os.Remove(socket)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	server := grpc.NewServer()
	csi.RegisterControllerServer(server, controller{image: image})
	return server.Serve(listener)
}
