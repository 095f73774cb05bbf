package locker

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
)

// backend is the database as a lock sees it. Timeouts, channels, delays and callers' contexts are
// the business of the lock.
type backend interface {
	// newID returns an ID that no other claim of the database has.
	newID() uuid.UUID
	// announce makes the claim the newest of its key and returns its standing. If the claim's
	// sequence number is too low, the error matches ErrClaimOutdated. It returns early, with
	// stopped, when ctx is done or stop is closed.
	announce(ctx context.Context, stop <-chan struct{}, a announcement) (answer, error)
	// withdraw records that an announced claim has given up. It only starts that, and the record
	// may be lost: only a redelivery of the same claim and the views of operators depend on it.
	withdraw(c claim)
	// acquire makes one attempt to take the key for the claim. It returns early, with stopped, when
	// ctx is done or stop is closed.
	acquire(ctx context.Context, stop <-chan struct{}, r request) (answer, error)
	// explain returns the holder and the newest claim of the key, for an error. It returns early,
	// with stopped, when ctx is done or stop is closed.
	explain(ctx context.Context, stop <-chan struct{}, key int64) (keyState, error)
	// release gives the key back if the claim holds it. The release is queued when the call
	// returns, and cannot be canceled. The returned operation is signaled on completion. If it is
	// nil, the release has completed.
	release(ctx context.Context, c claim) *op
	// events returns the hub to which a lock subscribes while it waits or holds.
	events() *hub
}

// claim is a request for a key.
type claim struct {
	key   int64
	id    uuid.UUID
	event string
}

// announcement is a claim that should become the newest.
type announcement struct {
	claim
	asked time.Time // when its caller asked for it
	terms terms     // with the labels of the lock
	// If the key is free and not waited for, it may be granted immediately, as the next acquire
	// would do.
	acquire bool
	// If pull is set and has another key, the claim is dropped with errKeyMoved.
	pull *pullRequest
}

// pullRequest identifies a pull request, which has a key.
type pullRequest struct {
	repo string
	pr   uint
}

// standing is a claim's place in the order of its key: the claim's number, and its ID in the
// database.
type standing struct {
	number int64
	id     uuid.UUID
}

// request is one attempt to acquire a key. A claim that was never announced has no standing at
// first. It accepts any newest claim, and keeps that claim's standing.
type request struct {
	claim
	standing standing
	labels   string // as JSON, or "" if there are none
	first    bool   // no standing yet: any newest claim is accepted
	skip     bool   // the key is not taken if another claim waits for it
	finish   bool   // the claim lets the holder finish
	blocker  int64  // the advisory lock of the holder's session, if the last attempt found it dead
}

type outcome int

const (
	busy       outcome = iota // another claim has the key
	granted                   // the key is the claim's
	superseded                // a newer claim exists
	again                     // undecided: try again immediately
)

// answer is the result of an announcement or a request.
type answer struct {
	outcome outcome
	newest  standing   // the newest claim of the key
	winner  *ClaimInfo // superseded, after an announcement: the newest claim
	// granted only:
	token   int64
	session uint64 // the generation of the session that holds the key
	spared  bool   // no claim notifies the holder before the max of WithProgress
	// busy only: the session of the holder is dead, and may be taken over at retryAt
	blocker int64
	retryAt time.Time
	// doubt reports whether an attempt that failed can have been granted the key.
	doubt bool
}

// keyState is the state of a key, for an error.
type keyState struct {
	newest  *ClaimInfo
	open    bool       // whether the newest claim waits or holds
	holder  *ClaimInfo // nil if the key is free
	heldFor time.Duration
	alive   bool // whether the holder's session is connected
	foreign *ForeignLock
}

// event is a message of a backend to the locks of a key.
type event struct {
	kind    eventKind
	hold    uuid.UUID  // newest, gone: the claim that holds the key, or held it
	from    standing   // claimed, newest: the newer claim
	claim   *ClaimInfo // claimed, newest: the same claim
	finish  bool       // claimed: it lets the holder finish
	message string     // manual: the operator's text
	session uint64     // lost: the generation of the session
	cause   error      // lost, gone: the reason
}

type eventKind int

const (
	evClaimed eventKind = iota + 1 // a hint: a claim was announced
	// From the row: a claim has asked the holder to stop. The event has the newest claim.
	evNewest
	evReleased // a hint: another attempt may succeed
	evManual   // an operator asks the holder to stop
	evLost     // the session is lost, with all its holds
	evGone     // the row no longer names the hold
	evClosed   // the provider is closing
)

// within calls f with a channel that is closed after bound, and returns the error of f. If f has
// ended early, that is ctx's error or ErrLockTimeout.
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

// stopped is the error of an operation whose caller has left before it was carried out. trouble is
// the reason for which it was not, or nil.
type stopped struct{ trouble error }

func (e stopped) Error() string { return "locker: stopped" }
