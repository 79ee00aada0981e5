// Command toc makes blobs with tables of contents of layers, by the libraries that define the formats.
//
// usage: toc estargz|zstd-chunked LAYER.tar BLOB
//
// It prints the blob's DiffID and the annotations of its descriptor, as JSON.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/containerd/stargz-snapshotter/estargz"
	"go.podman.io/storage/pkg/chunked/compressor"
)

type made struct {
	DiffID      string            `json:"diff_id"`
	Annotations map[string]string `json:"annotations"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "toc:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("usage: toc estargz|zstd-chunked LAYER.tar BLOB")
	}
	layer, err := os.Open(args[1])
	if err != nil {
		return err
	}
	defer layer.Close()
	blob, err := os.Create(args[2])
	if err != nil {
		return err
	}
	defer blob.Close()
	var done made
	switch args[0] {
	case "estargz":
		done, err = eStargz(layer, blob)
	case "zstd-chunked":
		done, err = zstdChunked(layer, blob)
	default:
		err = fmt.Errorf("no such format: %s", args[0])
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(done)
}

func eStargz(layer *os.File, blob io.Writer) (made, error) {
	info, err := layer.Stat()
	if err != nil {
		return made{}, err
	}
	// Small files share members, as nerdctl and buildx have it when they are asked to.
	built, err := estargz.Build(io.NewSectionReader(layer, 0, info.Size()), estargz.WithMinChunkSize(50_000))
	if err != nil {
		return made{}, err
	}
	defer built.Close()
	if _, err := io.Copy(blob, built); err != nil {
		return made{}, err
	}
	return made{
		DiffID:      built.DiffID().String(),
		Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: built.TOCDigest().String()},
	}, nil
}

func zstdChunked(layer io.Reader, blob io.Writer) (made, error) {
	annotations := map[string]string{}
	compressed, err := compressor.ZstdCompressor(blob, annotations, nil)
	if err != nil {
		return made{}, err
	}
	hash := sha256.New()
	if _, err := io.Copy(io.MultiWriter(compressed, hash), layer); err != nil {
		return made{}, err
	}
	if err := compressed.Close(); err != nil {
		return made{}, err
	}
	return made{DiffID: fmt.Sprintf("sha256:%x", hash.Sum(nil)), Annotations: annotations}, nil
}
