package locker

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/pkg/errors"
)

// This file is what WithOriginalReplicas adds. Next to replicas of the original library a hold also
// has the session-level advisory lock of its key, on the session's connection, because the original
// looks only at that lock.

// keyLocks are the advisory locks of keys that the session has. One connection can take an advisory
// lock twice, so owners decides between the locks of one provider. Only the goroutine of the
// session's connection takes advisory locks and gives them back, so no mutex is held while a
// statement runs.
type keyLocks struct {
	mu     sync.Mutex          // guards owners and back
	owners map[int64]uuid.UUID // the claims that have the locks of keys, or are about to take them
	back   []int64             // keys whose claims have given up the lock

	// Used only by the goroutine of the session's connection.
	ref sessionRef // the session of the connection
	// The keys whose locks the connection has.
	had   map[int64]bool
	stale []int64 // the session locks of earlier connections, which may still have the locks in owners
}

// acquireWithKeyLocks is acquireKeys for claims that also need the advisory locks of their keys.
func (w *worker) acquireWithKeyLocks(ctx context.Context, l *link, ref sessionRef, batch []*op) error {
	s := w.session
	if err := s.lockKeys(ctx, l, ref, batch); err != nil {
		return err
	}
	err := w.acquireKeys(ctx, l, ref, batch)
	s.keepKeys(batch, err)
	return err
}

// lockKeys takes the advisory locks of the keys that the batch may get, and records with each
// operation whether its claim has the lock, or whether that could not be tried. It does not touch
// the locks of keys that others hold, even if their sessions are suspended: the holders need them
// when they reconnect.
func (s *session) lockKeys(ctx context.Context, l *link, ref sessionRef, batch []*op) error {
	for _, o := range batch {
		o.keyLocked, o.untried = false, false
	}
	var key int64
	var free []claim
	if err := l.each(ctx, sqlTakeable, []any{keysOf(batch), idsOf(batch), s.deadOf(batch)}, []any{&key}, func() {
		free = append(free, find(batch, key).req.claim)
	}); err != nil {
		return err
	}
	wanted := s.keys.own(free)
	var failed error
	// No lock counts as taken until the connection has it.
	refused, tried := wanted, false
	s.onOwn(func(own *line) {
		if s.keys.ref == ref {
			refused, failed = s.tryKeys(own, wanted)
			tried = failed == nil
		}
	})
	s.keys.disown(wanted, refused)
	owned := s.keys.owned(free)
	for i, c := range free {
		o := find(batch, c.key)
		o.keyLocked, o.untried = owned[i], !owned[i] && !tried
	}
	if failed != nil && !broken(failed) {
		s.keepKeys(batch, failed)
		return failed
	}
	// Without a connection the session is suspended, and the statement takes nothing.
	return nil
}

// keepKeys gives back the advisory locks of claims that were not granted. That a claim whose lock
// could not be tried was not granted says nothing about the key.
func (s *session) keepKeys(batch []*op, err error) {
	owned := s.keys.owned(claimsOf(batch))
	var back []claim
	for i, o := range batch {
		granted := err == nil && o.answer.outcome == granted
		if o.untried && o.answer.outcome == busy {
			o.answer.outcome = again
		}
		switch {
		case owned[i] && !granted:
			back = append(back, o.req.claim)
		case granted && !owned[i]:
			// The session has reconnected meanwhile, and did not get the lock of the key. If that
			// happens again, the claim is released.
			o.answer, o.doubt = answer{outcome: again}, true
		}
	}
	s.unlockKeys(back)
}

// unlockKeys gives back the advisory locks of claims that are about to be released. The row
// follows: the next claim, which is notified then, finds the key free.
func (s *session) unlockKeys(claims []claim) {
	if s.keys.giveUp(claims) {
		s.onOwn(s.settleKeys)
	}
}

// onOwn makes the goroutine of the session's connection call f, if there is a connection, and waits
// for that.
func (s *session) onOwn(f func(own *line)) {
	s.mu.Lock()
	own := s.own
	s.mu.Unlock()
	if own != nil {
		own.do(func() { f(own) })
	}
}

// own records the claims as owners of their keys' locks, unless these have owners. It returns the
// keys that had none.
func (k *keyLocks) own(claims []claim) (wanted []int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range claims {
		if _, has := k.owners[c.key]; !has {
			wanted = append(wanted, c.key)
			k.owners[c.key] = c.id
		}
	}
	return wanted
}

// disown removes the owners of the given refused keys, whose locks others have. These are among
// those that own has returned.
func (k *keyLocks) disown(wanted, refused []int64) {
	if len(wanted) == 0 {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range refused {
		delete(k.owners, key)
		// A connection that was opened meanwhile may have taken the lock.
		k.back = append(k.back, key)
	}
}

// owned reports for each claim whether it owns the lock of its key.
func (k *keyLocks) owned(claims []claim) []bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := make([]bool, len(claims))
	for i, c := range claims {
		all[i] = k.owners[c.key] == c.id
	}
	return all
}

// giveUp removes the claims from the owners. It reports whether there are locks to give back.
func (k *keyLocks) giveUp(claims []claim) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range claims {
		if owner, has := k.owners[c.key]; has && owner == c.id {
			delete(k.owners, c.key)
			k.back = append(k.back, c.key)
		}
	}
	return len(k.back) > 0
}

// surplus returns the keys that were given up and have no owner again, and forgets them.
func (k *keyLocks) surplus() (keys []int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range k.back {
		if _, has := k.owners[key]; !has {
			keys = append(keys, key)
		}
	}
	k.back = nil
	return keys
}

// settleKeys gives back the advisory locks that have no owner any longer.
func (s *session) settleKeys(own *line) {
	var back []int64
	for _, key := range s.keys.surplus() {
		if s.keys.had[key] {
			back = append(back, key)
			delete(s.keys.had, key)
		}
	}
	s.giveBack(own, back)
}

// giveBack gives back advisory locks. If that fails, it closes the connection.
func (s *session) giveBack(own *line, keys []int64) {
	if len(keys) == 0 {
		return
	}
	if err := own.exec(s.keyDeadline(), fmt.Sprintf(sqlKeyUnlock, numbers(keys))); err != nil {
		// The locks end with the connection.
		own.end()
	}
}

// relockKeys takes the advisory locks of all holds on a new connection. If a replica of the
// original has taken the key of a hold, that hold is lost. It returns the number of holds that are
// lost.
func (s *session) relockKeys(own *line, ref sessionRef) (lost int, err error) {
	k := &s.keys
	if k.ref.generation == ref.generation {
		k.stale = append(k.stale, k.ref.lock)
	} else {
		k.stale = nil
	}
	claims := k.restart(k.ref.generation != ref.generation)
	k.ref, k.had = ref, map[int64]bool{}
	if len(claims) == 0 {
		return 0, nil
	}
	// The server may not have noticed yet that the last connection has ended. Until then that
	// connection has the locks.
	if err := own.exec(s.keyDeadline(), fmt.Sprintf(sqlSessionKill, numbers(k.stale))); err != nil {
		return 0, errors.Wrap(err, "locker: end the session's last connection")
	}
	if err := own.exec(s.keyDeadline(), fmt.Sprintf(sqlSessionDead, numbers(k.stale))); err != nil {
		return 0, errors.Wrap(err, "locker: wait for the end of the session's last connection")
	}
	k.stale = nil
	for some := range slices.Chunk(claims, maxChecked) {
		keys, holders := make([]int64, len(some)), map[int64]claim{}
		for i, c := range some {
			keys[i], holders[c.key] = c.key, c
		}
		refused, err := s.tryKeys(own, keys)
		if err != nil {
			return lost, errors.Wrap(err, "locker: take the keys' advisory locks")
		}
		for _, key := range refused {
			lost++
			k.giveUp([]claim{holders[key]})
			s.hub.dispatch(key, event{kind: evGone, hold: holders[key].id,
				cause: errors.New("the key's advisory lock was taken while the session was suspended")})
		}
	}
	return lost, nil
}

// restart returns the claims that own locks, for a connection that does not have the locks yet. If
// the last session was lost, there are none.
func (k *keyLocks) restart(lost bool) (claims []claim) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if lost {
		k.owners = map[int64]uuid.UUID{}
	}
	k.back = nil
	for key, id := range k.owners {
		claims = append(claims, claim{key: key, id: id})
	}
	return claims
}

// tryKeys takes advisory locks, and returns the keys whose locks others have. The connection
// returns no rows, so these keys are in the text of an error. If tryKeys fails, it has taken no
// locks.
func (s *session) tryKeys(own *line, keys []int64) (refused []int64, err error) {
	had := s.keys.had
	keys = slices.DeleteFunc(slices.Clone(keys), func(key int64) bool { return had[key] })
	if len(keys) == 0 {
		return nil, nil
	}
	if err := own.exec(s.keyDeadline(), fmt.Sprintf(sqlKeyLock, numbers(keys))); err != nil {
		if refused = refusedKeys(err); refused == nil {
			// It is not known how many of them the statement has taken.
			s.giveBack(own, keys)
			return keys, err
		}
	}
	for _, key := range keys {
		had[key] = true
	}
	for _, key := range refused {
		delete(had, key)
	}
	return refused, nil
}

// refusedKeys returns the keys in the error of sqlKeyLock, or nil if err is another error.
func refusedKeys(err error) (keys []int64) {
	e := pq.As(err)
	if e == nil {
		return nil
	}
	found := refusedPattern.FindStringSubmatch(e.Message)
	if found == nil {
		return nil
	}
	for text := range strings.SplitSeq(found[1], ",") {
		key, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return nil
		}
		keys = append(keys, key)
	}
	return keys
}

var refusedPattern = regexp.MustCompile(`locks that others have: ([-0-9,]+);`)

// keyDeadline returns how long a statement for keys may take on the session's connection.
func (s *session) keyDeadline() time.Duration {
	return min(heartbeatDeadline(s.conf.sessionTimeout), statementTimeout)
}

// numbers returns the elements of an array, for a statement that has no arguments.
func numbers(all []int64) string {
	var b strings.Builder
	for i, n := range all {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.FormatInt(n, 10))
	}
	return b.String()
}
