// Command testregistry serves OCI image layouts over the distribution API, with ranges, and
// misbehaves as it is told: it delays, is slow, refuses, stalls, breaks off and corrupts.
//
//	GET, HEAD /v2/, /v2/REPOSITORY/manifests/TAG-OR-DIGEST, /v2/REPOSITORY/blobs/DIGEST
//	GET, POST /__control    the settings as JSON; POST replaces all of them
//	GET       /__counters   what was asked for and sent, per digest and in all
//	POST      /__reset      sets the counters to zero
//
//	GET       /token        a token for a user of the settings, if those name any
//
// It is read-only, and asks for credentials if the settings name users. It has no referrers API, as docker-registry 2.8.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
)

const usage = `usage: testregistry [--listen HOST:PORT] [--settings JSON] --layout REPOSITORY=DIR [--layout REPOSITORY=DIR]...
Serves the OCI image layout DIR as REPOSITORY. --settings is what POST /__control takes, for example
{"delay_milliseconds": 20, "rate_bytes_per_second": 1000000, "faults": [{"kind": "status", "status": 503, "times": 2}]}`

// layouts are directories by repository, as --layout gives them.
type layouts map[string]string

func (l layouts) String() string { return fmt.Sprint(map[string]string(l)) }

func (l layouts) Set(word string) error {
	repository, directory, found := strings.Cut(word, "=")
	if !found || repository == "" {
		return fmt.Errorf("want REPOSITORY=DIR, not %q", word)
	}
	if _, err := os.Stat(directory + "/index.json"); err != nil {
		return fmt.Errorf("%s is no OCI image layout: %w", directory, err)
	}
	l[repository] = directory
	return nil
}

func main() {
	served := layouts{}
	flag.Usage = func() { fmt.Fprintln(os.Stderr, usage) }
	listen := flag.String("listen", "127.0.0.1:5000", "")
	text := flag.String("settings", "{}", "")
	flag.Var(served, "layout", "")
	flag.Parse()
	settings, err := parseSettings(strings.NewReader(*text))
	if err != nil {
		fail(2, err)
	}
	if len(served) == 0 || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		fail(1, err)
	}
	fmt.Printf("listening on %s\n", listener.Addr())
	server := http.Server{
		Handler: newRegistry(served, settings),
		// A fault may have to break the connection itself.
		ConnContext: func(ctx context.Context, connection net.Conn) context.Context {
			return context.WithValue(ctx, connectionKey{}, connection)
		},
	}
	fail(1, server.Serve(listener))
}

func fail(status int, err error) {
	fmt.Fprintln(os.Stderr, "testregistry:", err)
	os.Exit(status)
}
