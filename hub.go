package locker

import (
	"sync"

	"github.com/google/uuid"
)

// hub knows which locks of a provider wait for or hold which key, and passes events to them. All
// methods are safe for concurrent use.
type hub struct {
	alarms alarms

	// mu guards everything below, and the fields next, prev and place of the locks. It is not held
	// while a lock handles an event.
	mu     sync.Mutex
	locks  map[int64]*lock
	count  int
	holds  []*lock
	closed bool
	// Created by close, and closed when the last lock has left.
	empty chan struct{}
}

func newHub() *hub { return &hub{locks: map[int64]*lock{}} }

// subscribe adds a lock to those that get the events of its key. It returns ErrProviderClosed if
// the hub is closed.
func (h *hub) subscribe(l *lock) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return ErrProviderClosed
	}
	if head := h.locks[l.claim.key]; head != nil {
		l.next, head.prev = head, l
	}
	h.locks[l.claim.key] = l
	h.count++
	return nil
}

// unsubscribe removes a lock. It does nothing if the lock is not subscribed.
func (h *hub) unsubscribe(l *lock) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case l.prev != nil:
		l.prev.next = l.next
	case h.locks[l.claim.key] != l:
		return
	case l.next != nil:
		h.locks[l.claim.key] = l.next
	default:
		delete(h.locks, l.claim.key)
	}
	if l.next != nil {
		l.next.prev = l.prev
	}
	l.next, l.prev = nil, nil
	if l.place > 0 {
		last := len(h.holds) - 1
		h.holds[l.place-1] = h.holds[last]
		h.holds[l.place-1].place = l.place
		h.holds[last], h.holds, l.place = nil, h.holds[:last], 0
	}
	h.count--
	if h.closed && h.count == 0 {
		close(h.empty)
	}
}

// hold records that a subscribed lock holds its key.
func (h *hub) hold(l *lock) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.holds = append(h.holds, l)
	l.place = len(h.holds)
}

// counts returns the number of locks that hold, and of all other subscribed locks, which wait.
func (h *hub) counts() (holds, waits int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.holds), h.count - len(h.holds)
}

// held returns up to n of the claims that hold, from the last to the first, moves the cursor, and
// reports whether there are more. At 0 the cursor begins again. A hold that ends is replaced by the
// last one, so none is skipped.
func (h *hub) held(cursor *int, n int) (claims []claim, more bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if *cursor <= 0 || *cursor > len(h.holds) {
		*cursor = len(h.holds)
	}
	from := max(0, *cursor-n)
	for _, l := range h.holds[from:*cursor] {
		claims = append(claims, l.claim)
	}
	*cursor = from
	return claims, from > 0
}

// knows reports whether a lock with that claim waits or holds.
func (h *hub) knows(key int64, id uuid.UUID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for l := h.locks[key]; l != nil; l = l.next {
		if l.claim.id == id {
			return true
		}
	}
	return false
}

// dispatch passes an event to the key's locks.
func (h *hub) dispatch(key int64, ev event) {
	h.mu.Lock()
	var few [4]*lock
	locks := few[:0]
	for l := h.locks[key]; l != nil; l = l.next {
		locks = append(locks, l)
	}
	h.mu.Unlock()
	for _, l := range locks {
		l.handle(ev)
	}
}

// broadcast passes an event to every lock.
func (h *hub) broadcast(ev event) {
	h.mu.Lock()
	locks := make([]*lock, 0, h.count)
	for _, l := range h.locks {
		for ; l != nil; l = l.next {
			locks = append(locks, l)
		}
	}
	h.mu.Unlock()
	for _, l := range locks {
		l.handle(ev)
	}
}

// close ends every wait, notifies every holder, and returns when all locks have left. A holder that
// does not release is revoked by its own lock. Later calls of subscribe return ErrProviderClosed.
func (h *hub) close() {
	h.mu.Lock()
	if !h.closed {
		h.closed = true
		h.empty = make(chan struct{})
		if h.count == 0 {
			close(h.empty)
		}
	}
	h.mu.Unlock()
	h.broadcast(event{kind: evClosed})
	<-h.empty
	h.alarms.stop()
}
