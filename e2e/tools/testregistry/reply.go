package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

// blockBytes are sent at once when an answer is slow or meets a fault.
const blockBytes = 32 << 10

// countedBytes are sent between two looks at the counters, when nothing goes wrong.
const countedBytes = 1 << 20

// connectionKey is where a request's context has its connection.
type connectionKey struct{}

// reply answers, and does what the fault says, if there is one.
func (r *registry) reply(w http.ResponseWriter, request *http.Request, a *answer, f *fault) {
	stop := a.end
	if f != nil {
		switch f.Kind {
		case "status":
			if f.RetryAfterSeconds != nil {
				w.Header().Set("Retry-After", strconv.Itoa(*f.RetryAfterSeconds))
			}
			code := "UNKNOWN"
			if f.Status == http.StatusTooManyRequests {
				code = "TOOMANYREQUESTS"
			}
			refuse(w, f.Status, code, "told to")
			return
		case "ignore_range":
			a.begin, a.end, a.ranged = 0, a.size, false
			stop = a.end
		case "shorten":
			a.end, stop = f.AtByte, f.AtByte
		case "truncate":
			stop = f.AtByte
		case "reset":
			stop = f.AtByte
			if stop == a.begin {
				resetConnection(request)
			}
		}
	}
	header := w.Header()
	header.Set("Docker-Content-Digest", a.digest)
	header.Set("Content-Type", a.mediaType)
	header.Set("Content-Length", strconv.FormatInt(a.end-a.begin, 10))
	status := http.StatusOK
	if a.kind == "blobs" {
		header.Set("Accept-Ranges", "bytes")
	}
	if a.ranged {
		status = http.StatusPartialContent
		header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", a.begin, max(a.end-1, a.begin), a.size))
	}
	w.WriteHeader(status)
	if a.method == http.MethodHead {
		return
	}
	if f != nil {
		// The header arrives also if no byte follows it.
		_ = http.NewResponseController(w).Flush()
	}
	file, err := os.Open(a.file)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	defer file.Close()
	if _, err := file.Seek(a.begin, io.SeekStart); err != nil {
		panic(http.ErrAbortHandler)
	}
	r.send(w, request, file, a, f, stop)
	if f != nil && f.Kind == "reset" {
		resetConnection(request)
	}
	if stop < a.end {
		// Closes the connection, because less was sent than was announced.
		panic(http.ErrAbortHandler)
	}
}

// send sends the file from where it is, which is a.begin, up to stop.
func (r *registry) send(w http.ResponseWriter, request *http.Request, file *os.File, a *answer, f *fault, stop int64) {
	sent := func(n int64) { r.counters.add(a, func(c *count) { c.BytesSent += n }) }
	if f == nil && r.misdeeds.current().RateBytesPerSecond == 0 {
		// The kernel copies (sendfile), in pieces, so that the counters go along. Whoever went away has had enough.
		for at := a.begin; at < stop; {
			n, err := io.CopyN(w, file, min(countedBytes, stop-at))
			sent(n)
			if err != nil {
				return
			}
			at += n
		}
		return
	}
	flusher := http.NewResponseController(w)
	buffer := make([]byte, blockBytes)
	for at := a.begin; at < stop; {
		want := min(int64(len(buffer)), stop-at)
		// A block ends where something is to happen.
		if f != nil && at < f.AtByte {
			want = min(want, f.AtByte-at)
		}
		n, err := io.ReadFull(file, buffer[:want])
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if f != nil && at == f.AtByte {
			switch f.Kind {
			case "stall":
				select {
				case <-time.After(time.Duration(f.StallSeconds * float64(time.Second))):
				case <-request.Context().Done():
					return
				}
			case "flip_bit":
				buffer[0] ^= 1
			}
		}
		if pause := r.misdeeds.pause(n); pause > 0 {
			time.Sleep(pause)
		}
		written, err := w.Write(buffer[:n])
		sent(int64(written))
		if err != nil || flusher.Flush() != nil {
			return
		}
		at += int64(n)
	}
}

// resetConnection ends the connection by RST, and with it the handler.
func resetConnection(request *http.Request) {
	if connection, ok := request.Context().Value(connectionKey{}).(*net.TCPConn); ok {
		_ = connection.SetLinger(0)
		_ = connection.Close()
	}
	panic(http.ErrAbortHandler)
}
