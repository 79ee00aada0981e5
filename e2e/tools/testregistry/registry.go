package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

var (
	route      = regexp.MustCompile(`^/v2/(.+)/(manifests|blobs)/([^/]+)$`)
	digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

// errUnknown is an answer of 404.
var errUnknown = errors.New("unknown")

type registry struct {
	layouts  layouts
	misdeeds misbehaviour
	counters counters
	auth     auth
}

// answer is what one request is given, before anything goes wrong.
type answer struct {
	method string
	// kind is "blobs" or "manifests".
	kind, digest, mediaType, file string
	// size is the whole content's; begin and end are what of it is asked for.
	size, begin, end int64
	ranged           bool
}

func newRegistry(served layouts, s *settings) *registry {
	r := &registry{layouts: served, counters: counters{page: newPage()}}
	r.misdeeds.set(s)
	return r
}

func (r *registry) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	path, read := request.URL.Path, request.Method == http.MethodGet || request.Method == http.MethodHead
	switch {
	case strings.HasPrefix(path, "/__"):
		r.administer(w, request)
	case path == "/token" && request.Method == http.MethodGet:
		r.delay()
		r.auth.token(w, request, r.misdeeds.current())
	case !read:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is read-only")
	case path == "/v2/" || path == "/v2":
		r.delay()
		w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
		writeJSON(w, struct{}{})
	default:
		r.delay()
		r.serve(w, request)
	}
}

func (r *registry) delay() {
	time.Sleep(time.Duration(r.misdeeds.current().DelayMilliseconds) * time.Millisecond)
}

// administer is the part that no registry has.
func (r *registry) administer(w http.ResponseWriter, request *http.Request) {
	switch request.Method + " " + request.URL.Path {
	case "GET /__control":
		writeJSON(w, r.misdeeds.current())
	case "POST /__control":
		s, err := parseSettings(request.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		r.misdeeds.set(s)
		writeJSON(w, s)
	case "GET /__counters":
		r.counters.mutex.Lock()
		defer r.counters.mutex.Unlock()
		writeJSON(w, r.counters.page)
	case "POST /__reset":
		r.counters.reset()
	default:
		http.NotFound(w, request)
	}
}

func (r *registry) serve(w http.ResponseWriter, request *http.Request) {
	parts := route.FindStringSubmatch(request.URL.Path)
	if parts == nil {
		refuse(w, http.StatusNotFound, "UNSUPPORTED", "no such endpoint")
		return
	}
	if !r.auth.lets(w, request, r.misdeeds.current(), parts[1]) {
		return
	}
	a, err := r.find(parts[1], parts[2], parts[3])
	if err != nil {
		code := map[string]string{"blobs": "BLOB_UNKNOWN", "manifests": "MANIFEST_UNKNOWN"}[parts[2]]
		status := http.StatusInternalServerError
		if errors.Is(err, errUnknown) {
			status = http.StatusNotFound
		}
		refuse(w, status, code, err.Error())
		return
	}
	a.method, a.begin, a.end = request.Method, 0, a.size
	// A manifest is given whole, and so is a blob of which several ranges are asked for, as RFC 9110 allows.
	if text := request.Header.Get("Range"); text != "" && a.kind == "blobs" && a.method == http.MethodGet {
		begin, end, usable := parseRange(text, a.size)
		if usable && begin >= end {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", a.size))
			refuse(w, http.StatusRequestedRangeNotSatisfiable, "RANGE_INVALID", "the range is outside of the blob")
			return
		}
		if usable {
			a.begin, a.end, a.ranged = begin, end, true
		}
	}
	r.counters.add(a, func(c *count) {
		c.Requests[a.method]++
		if a.ranged {
			c.Ranged++
		}
	})
	f := r.misdeeds.choose(a)
	if f != nil {
		r.counters.add(a, func(c *count) { c.Faults[f.Kind]++ })
	}
	r.reply(w, request, a, f)
}

// find looks a manifest or blob up in a layout.
func (r *registry) find(repository, kind, reference string) (*answer, error) {
	directory, found := r.layouts[repository]
	if !found {
		return nil, fmt.Errorf("repository %s: %w", repository, errUnknown)
	}
	a := &answer{kind: kind, digest: reference, mediaType: "application/octet-stream"}
	if kind == "manifests" && !digestForm.MatchString(reference) {
		digest, err := tagged(directory, reference)
		if err != nil {
			return nil, err
		}
		a.digest = digest
	}
	if !digestForm.MatchString(a.digest) {
		return nil, fmt.Errorf("digest %q: %w", a.digest, errUnknown)
	}
	a.file = filepath.Join(directory, "blobs", "sha256", strings.TrimPrefix(a.digest, "sha256:"))
	info, err := os.Stat(a.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", a.digest, errUnknown)
	}
	if err != nil {
		return nil, err
	}
	a.size = info.Size()
	if kind == "manifests" {
		a.mediaType, err = mediaType(a.file)
	}
	return a, err
}

// tagged returns the digest under a tag of a layout.
func tagged(directory, tag string) (string, error) {
	data, err := os.ReadFile(filepath.Join(directory, "index.json"))
	if err != nil {
		return "", err
	}
	var index struct {
		Manifests []struct {
			Digest      string            `json:"digest"`
			Annotations map[string]string `json:"annotations"`
		} `json:"manifests"`
	}
	if err := json.Unmarshal(data, &index); err != nil {
		return "", err
	}
	for _, it := range index.Manifests {
		if it.Annotations["org.opencontainers.image.ref.name"] == tag {
			return it.Digest, nil
		}
	}
	return "", fmt.Errorf("tag %s: %w", tag, errUnknown)
}

// mediaType returns what a manifest says it is; one that says nothing is told by its fields.
func mediaType(file string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var manifest struct {
		MediaType string            `json:"mediaType"`
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(data, &manifest); err != nil {
		sum := sha256.Sum256(data)
		return "", fmt.Errorf("sha256:%s is no manifest: %w", hex.EncodeToString(sum[:]), errUnknown)
	}
	switch {
	case manifest.MediaType != "":
		return manifest.MediaType, nil
	case manifest.Manifests != nil:
		return "application/vnd.oci.image.index.v1+json", nil
	default:
		return "application/vnd.oci.image.manifest.v1+json", nil
	}
}

// parseRange understands one range of bytes; begin is not before end if it is outside of the content.
func parseRange(text string, size int64) (begin, end int64, usable bool) {
	spec, found := strings.CutPrefix(text, "bytes=")
	first, last, dash := strings.Cut(spec, "-")
	if !found || !dash || strings.Contains(spec, ",") {
		return 0, 0, false
	}
	if first == "" {
		n, err := strconv.ParseInt(last, 10, 64)
		return max(0, size-n), size, err == nil && n >= 0
	}
	begin, err := strconv.ParseInt(first, 10, 64)
	if err != nil || begin < 0 {
		return 0, 0, false
	}
	if last == "" {
		return begin, size, true
	}
	end, err = strconv.ParseInt(last, 10, 64)
	if err != nil || end < begin {
		return 0, 0, false
	}
	return begin, min(end+1, size), true
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// Whoever went away needs no answer.
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value)
}
