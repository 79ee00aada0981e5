package main

import "sync"

// count is what was asked for and sent, of one digest or in all.
type count struct {
	// Requests by method, those that a fault met included.
	Requests map[string]int `json:"requests"`
	// Ranged are the GETs that asked for a range.
	Ranged int `json:"ranged"`
	// BytesSent of bodies, as far as the connection took them.
	BytesSent int64 `json:"bytes_sent"`
	// Faults by kind.
	Faults map[string]int `json:"faults"`
}

func newCount() *count {
	return &count{Requests: map[string]int{}, Faults: map[string]int{}}
}

// page is what GET /__counters answers.
type page struct {
	Total     *count            `json:"total"`
	Blobs     map[string]*count `json:"blobs"`
	Manifests map[string]*count `json:"manifests"`
}

func newPage() page {
	return page{Total: newCount(), Blobs: map[string]*count{}, Manifests: map[string]*count{}}
}

type counters struct {
	mutex sync.Mutex
	page  page
}

// add changes the counts of an answer's digest, and the total.
func (c *counters) add(a *answer, change func(*count)) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	below := c.page.Blobs
	if a.kind == "manifests" {
		below = c.page.Manifests
	}
	if below[a.digest] == nil {
		below[a.digest] = newCount()
	}
	change(below[a.digest])
	change(c.page.Total)
}

func (c *counters) reset() {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.page = newPage()
}
