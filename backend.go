package locker

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
)

// backend is the database as the lock sees it. Timeouts, channels, delays and
// callers' contexts belong to the lock, not to the backend.
type backend interface {
	// newID returns an ID that no other claim of the database has.
	newID() uuid.UUID
	// announce makes the claim known and returns its standing as the newest, or an
	// error that matches ErrClaimOutdated if its order is too low. It returns early,
	// with stopped, when ctx is done or stop is closed.
	announce(ctx context.Context, stop <-chan struct{}, a announcement) (answer, error)
	// withdraw says that an announced claim gave up. It is begun when the call
	// returns, and may be lost: it matters only to its own redelivery, and to who
	// looks.
	withdraw(c claim)
	// acquire tries once to take the key for the claim. It returns early, with stopped,
	// when ctx is done or stop is closed.
	acquire(ctx context.Context, stop <-chan struct{}, r request) (answer, error)
	// explain returns who holds the key and what its newest claim is, for an error. It
	// returns early, with stopped, when ctx is done or stop is closed.
	explain(ctx context.Context, stop <-chan struct{}, key int64) (keyState, error)
	// release gives the key back if the claim holds it. It is queued when the call
	// returns and cannot be canceled. The returned operation is signaled when it is
	// done; nil means that it is.
	release(ctx context.Context, c claim) *op
	// events is where the lock subscribes while it waits or holds.
	events() *hub
}

// claim is a caller's wish to hold a key.
type claim struct {
	key    int64
	id     uuid.UUID
	event  string
	labels string // as JSON; "" if there are none
}

// announcement is a claim that becomes the newest.
type announcement struct {
	claim
	asked time.Time // when its caller asked for it
	terms terms
	take  bool         // if the key is free and not waited for, it may be granted immediately, as acquire would do next
	pull  *pullRequest // if set, the claim is dropped with errKeyMoved if this pull request has another key
}

// pullRequest is what has a key.
type pullRequest struct {
	repo string
	pr   uint
}

// standing is a claim's place in the order of its key: its number, and the ID
// under which the database knows it.
type standing struct {
	number int64
	id     uuid.UUID
}

// request is one try to acquire. A claim that was never announced has no
// standing at first: it accepts whatever is the newest claim, and then keeps
// that claim's standing as its own.
type request struct {
	claim
	standing standing
	first    bool  // no standing yet: any newest claim will do
	skip     bool  // the key is not taken if another claim waits for it
	finish   bool  // the claim lets the holder finish
	blocker  int64 // the advisory lock of the holder's session, if the last attempt found it dead
}

type outcome int

const (
	busy       outcome = iota // another claim has the key
	granted                   // the key is the claim's
	superseded                // a newer claim exists
	again                     // undecided: try again immediately
)

// answer is the database's answer to a request.
type answer struct {
	outcome outcome
	newest  standing   // the newest claim of the key
	winner  *ClaimInfo // superseded, of an announcement: the newest claim
	// granted only:
	token   int64
	session uint64 // the generation of the session that holds the key
	spared  bool   // no claim notifies the holder before WithProgress's max
	// busy only: the holder's session is dead, and may be taken over at that time
	blocker int64
	retryAt time.Time
	// doubt is set if the key may have been granted by an attempt whose answer was lost.
	doubt bool
}

// keyState is a key as an error describes it.
type keyState struct {
	newest  *ClaimInfo
	open    bool       // the newest claim waits or holds
	holder  *ClaimInfo // nil if the key is free
	heldFor time.Duration
	alive   bool // the holder's session is connected
	foreign *ForeignLock
}

// event is what a backend tells the locks of a key.
type event struct {
	kind    eventKind
	hold    uuid.UUID  // newest, gone: the claim that holds, or held
	from    standing   // claimed, newest: the newer claim
	claim   *ClaimInfo // claimed, newest: the same claim
	finish  bool       // claimed: it lets the holder finish
	message string     // manual: the operator's text
	session uint64     // lost: generation of the session
	cause   error      // lost, gone: why
}

type eventKind int

const (
	evClaimed  eventKind = iota + 1 // hint: a claim was announced
	evNewest                        // from the row: a claim asks the holder to stop; the newest is told
	evReleased                      // hint: trying again may succeed
	evManual                        // an operator asks the holder to stop
	evLost                          // the session is lost, and what it held
	evGone                          // the row does not name the hold any longer
	evClosed                        // the provider is closing
)

// within calls f with a channel that is closed after bound, and returns what a wait
// that ended early has ended with: ctx's error or ErrLockTimeout.
func within(ctx context.Context, bound time.Duration, f func(stop <-chan struct{}) error) error {
	stop := make(chan struct{})
	defer time.AfterFunc(bound, func() { close(stop) }).Stop()
	err := f(stop)
	early := stopped{}
	if !errors.As(err, &early) {
		return err
	}
	err = ErrLockTimeout
	if ctx.Err() != nil {
		err = contextError(ctx)
	}
	if early.trouble != nil {
		err = annotate(err, "%v", early.trouble)
	}
	return err
}

// stopped is the error of an operation of the backend whose caller has left before it
// was carried out. trouble is why it was not, if there was a reason.
type stopped struct{ trouble error }

func (e stopped) Error() string { return "locker: stopped" }
