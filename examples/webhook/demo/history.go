package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// history contains all events so far, in the order in which the driver received them.
type history struct {
	mu      sync.Mutex
	events  []Event
	changed chan struct{} // closed, and replaced, whenever an event is added
}

func newHistory() *history { return &history{changed: make(chan struct{})} }

func (h *history) add(e Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = append(h.events, e)
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *history) all() []Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.events)
}

// wait returns the first event, past or future, that is wanted. It gives up when ctx is done, and
// after an event that makes the rest of the story pointless.
func (h *history) wait(ctx context.Context, what string, wanted func(Event) bool) (Event, error) {
	for next := 0; ; {
		h.mu.Lock()
		events, changed := h.events[next:], h.changed
		next = len(h.events)
		h.mu.Unlock()
		for _, e := range events {
			switch {
			case wanted(e):
				return e, nil
			case e.Kind == failed, e.Kind == exited:
				return Event{}, fmt.Errorf("while waiting for %s: %s %s %s", what, e.Replica, e.Kind, e.Reason)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Event{}, fmt.Errorf("while waiting for %s: %w", what, context.Cause(ctx))
		}
	}
}
