package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"sync"
	"time"
)

// A fault is one way to misbehave, and whom it meets.
type fault struct {
	// Kind is one of:
	//   status        answers Status, with Retry-After if RetryAfterSeconds is given
	//   stall         is silent for StallSeconds before byte AtByte
	//   truncate      closes the connection before byte AtByte, short of the announced length
	//   shorten       announces and sends only what is before byte AtByte: a whole answer, too short
	//   flip_bit      flips the lowest bit of byte AtByte
	//   ignore_range  answers a ranged request with 200 and the whole blob
	//   reset         resets the connection (RST) before byte AtByte; before the header if that is the first one asked for
	Kind string `json:"kind"`

	Status            int     `json:"status,omitempty"`
	RetryAfterSeconds *int    `json:"retry_after_seconds,omitempty"`
	StallSeconds      float64 `json:"stall_seconds,omitempty"`
	// AtByte counts in the blob, also when a range of it is asked for: an answer without that byte is spared.
	AtByte int64 `json:"at_byte,omitempty"`

	// Only is "blobs" or "manifests"; both when empty. Digest narrows it to one of them, Method is GET when empty.
	Only   string `json:"only,omitempty"`
	Digest string `json:"digest,omitempty"`
	Method string `json:"method,omitempty"`

	// Skip spares as many answers first, then Times are met, all when 0, each with this Probability, always when 0.
	Skip        int     `json:"skip,omitempty"`
	Times       int     `json:"times,omitempty"`
	Probability float64 `json:"probability,omitempty"`
}

// settings are all that can be changed while it runs.
type settings struct {
	DelayMilliseconds  int     `json:"delay_milliseconds"`
	RateBytesPerSecond int64   `json:"rate_bytes_per_second"`
	Seed               int64   `json:"seed"`
	Faults             []fault `json:"faults"`
	// Users are who may pull, and from which repositories: {"name:password": ["a/b"]}. Everybody may when there are none.
	Users map[string][]string `json:"users,omitempty"`
	// TokenSeconds is how long a token is good, an hour when 0.
	TokenSeconds float64 `json:"token_seconds,omitempty"`
}

func parseSettings(text io.Reader) (*settings, error) {
	out := &settings{}
	decoder := json.NewDecoder(text)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(out); err != nil {
		return nil, fmt.Errorf("settings: %w", err)
	}
	if out.DelayMilliseconds < 0 || out.RateBytesPerSecond < 0 || out.TokenSeconds < 0 {
		return nil, fmt.Errorf("settings: none of delay_milliseconds, rate_bytes_per_second and token_seconds may be negative")
	}
	for i := range out.Faults {
		if err := out.Faults[i].check(); err != nil {
			return nil, fmt.Errorf("settings: fault %d: %w", i, err)
		}
	}
	return out, nil
}

func (f *fault) check() error {
	switch f.Kind {
	case "status":
		if f.Status < 400 || f.Status > 599 {
			return fmt.Errorf("status must be from 400 to 599, not %d", f.Status)
		}
	case "stall":
		if f.StallSeconds <= 0 {
			return fmt.Errorf("stall needs stall_seconds")
		}
	case "truncate", "shorten", "flip_bit", "ignore_range", "reset":
	default:
		return fmt.Errorf("no kind %q", f.Kind)
	}
	if f.Only != "" && f.Only != "blobs" && f.Only != "manifests" {
		return fmt.Errorf(`only is "blobs" or "manifests", not %q`, f.Only)
	}
	if f.AtByte < 0 || f.Skip < 0 || f.Times < 0 || f.Probability < 0 || f.Probability > 1 {
		return fmt.Errorf("at_byte, skip and times must not be negative, probability from 0 to 1")
	}
	if f.Method == "" {
		f.Method = http.MethodGet
	}
	return nil
}

// meets tells whether an answer is one that the fault is for, apart from chance and number.
func (f *fault) meets(a *answer) bool {
	if f.Method != a.method || (f.Only != "" && f.Only != a.kind) || (f.Digest != "" && f.Digest != a.digest) {
		return false
	}
	switch f.Kind {
	case "status":
		return true
	case "ignore_range":
		return a.ranged
	default:
		return a.begin <= f.AtByte && f.AtByte < a.end
	}
}

// misbehaviour holds the settings, and how often each fault was considered.
type misbehaviour struct {
	mutex    sync.Mutex
	settings *settings
	seen     []int
	dice     *rand.Rand
	// When the line is free again: all answers share one rate.
	freeAt time.Time
}

func (m *misbehaviour) set(s *settings) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	m.settings, m.seen, m.dice = s, make([]int, len(s.Faults)), rand.New(rand.NewSource(s.Seed))
	m.freeAt = time.Time{}
}

func (m *misbehaviour) current() settings {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return *m.settings
}

// choose returns the first fault that meets an answer, or nil.
func (m *misbehaviour) choose(a *answer) *fault {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	for i := range m.settings.Faults {
		f := &m.settings.Faults[i]
		if !f.meets(a) {
			continue
		}
		n := m.seen[i]
		if n < f.Skip {
			m.seen[i]++
			continue
		}
		if f.Times > 0 && n >= f.Skip+f.Times {
			continue
		}
		if f.Probability > 0 && m.dice.Float64() >= f.Probability {
			continue
		}
		m.seen[i]++
		return f
	}
	return nil
}

// pause takes n bytes' time on the line and returns how long to wait before they may be sent.
func (m *misbehaviour) pause(n int) time.Duration {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if m.settings.RateBytesPerSecond == 0 {
		return 0
	}
	now := time.Now()
	if m.freeAt.Before(now) {
		m.freeAt = now
	}
	m.freeAt = m.freeAt.Add(time.Duration(float64(n) / float64(m.settings.RateBytesPerSecond) * float64(time.Second)))
	return m.freeAt.Sub(now)
}
