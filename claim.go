package locker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// A ClaimMode determines what a claim does to older claims of its key. The mode of the newer claim
// decides. The mode of the holder does not protect it.
type ClaimMode int

const (
	// Preempt is the default. Older waiters are superseded, and the holder is notified.
	Preempt ClaimMode = iota
	// LetFinish does not notify the holder: the claim waits until the holder has finished. Older
	// waiters are superseded. A later claim that preempts notifies the holder anyway.
	LetFinish
	// SkipIfBusy makes a claim that other claims do not see. If the key is held or waited for, Lock
	// returns [ErrLockBusy] immediately. Otherwise it takes the key. A waiter that was not
	// announced, by a Lock without Notify, does not count.
	//
	// A key whose holder has crashed is busy until this process has watched the holder's session
	// being dead for the session timeout. The first claim starts the watch.
	//
	// A claim that skips is compared with no other claim, so Lock returns an error if it has a
	// sequence number.
	SkipIfBusy
)

// String returns "preempt", "let_finish" or "skip_if_busy", for the label of a metric.
func (m ClaimMode) String() string {
	names := [...]string{"preempt", "let_finish", "skip_if_busy"}
	if m < 0 || int(m) >= len(names) {
		return fmt.Sprintf("ClaimMode(%d)", int(m))
	}
	return names[m]
}

// MarshalText returns the result of String. It returns an error for an unknown mode.
func (m ClaimMode) MarshalText() ([]byte, error) {
	return []byte(m.String()), (terms{mode: m}).check()
}

// UnmarshalText accepts the results of String, for flags and configuration files. It returns an
// error for any other text.
func (m *ClaimMode) UnmarshalText(text []byte) error {
	for known := Preempt; known <= SkipIfBusy; known++ {
		if known.String() == string(text) {
			*m = known
			return nil
		}
	}
	return fmt.Errorf("locker: unknown claim mode %q: want %q, %q or %q", text, Preempt, LetFinish, SkipIfBusy)
}

// terms are the settings of a claim, apart from its event. A context carries them through providers
// of any kind.
type terms struct {
	sequence *int64
	mode     ClaimMode
	moded    bool   // mode was set
	labels   string // as JSON, or "" if there are none
	// How long to wait for the key, by PreemptiveLocker.Wait. 0 means the lock timeout.
	wait time.Duration
}

type termsKey struct{}

func termsFromContext(ctx context.Context) terms {
	if t, ok := ctx.Value(termsKey{}).(*terms); ok {
		return *t
	}
	return terms{}
}

func contextWithTerms(ctx context.Context, t terms) context.Context {
	if t == termsFromContext(ctx) {
		return ctx
	}
	return context.WithValue(ctx, termsKey{}, &t)
}

// orElse returns the terms t. Settings that t does not have are those of others.
func (t terms) orElse(others terms) terms {
	if t.sequence == nil {
		t.sequence = others.sequence
	}
	if !t.moded {
		t.mode, t.moded = others.mode, others.moded
	}
	if t.labels == "" {
		t.labels = others.labels
	}
	return t
}

// check returns an error if the terms are not valid.
func (t terms) check() error {
	switch {
	case t.mode < Preempt || t.mode > SkipIfBusy:
		return fmt.Errorf("unknown claim mode %d", int(t.mode))
	case t.mode == SkipIfBusy && t.sequence != nil:
		return fmt.Errorf("a claim with the mode SkipIfBusy has no sequence number: it is never compared with others")
	case len(t.labels) > maxLabels:
		return fmt.Errorf("labels take %d bytes as JSON: no more than %d are allowed", len(t.labels), maxLabels)
	}
	return nil
}

// ContextWithSequence returns a context that carries the sequence number of a claim to Notify of a
// [PreemptableLock], through any providers in between. Every claim that is made with the context,
// or with one derived from it, has the number, unless another one is set. With a PreemptiveLocker
// use [PreemptiveLocker.Sequence].
func ContextWithSequence(ctx context.Context, sequence int64) context.Context {
	t := termsFromContext(ctx)
	t.sequence = &sequence
	return contextWithTerms(ctx, t)
}

// SequenceFromContext returns the number that [ContextWithSequence] has set, and reports whether
// there is one. Notify of a custom provider's locks can use it to reject claims that arrive too
// late.
func SequenceFromContext(ctx context.Context) (sequence int64, ok bool) {
	if s := termsFromContext(ctx).sequence; s != nil {
		return *s, true
	}
	return 0, false
}

// ContextWithMode returns a context that carries the mode of a claim to Notify and Lock of a
// [PreemptableLock], through any providers in between. In the mode [SkipIfBusy] Notify does
// nothing, and Lock decides. With a PreemptiveLocker use [PreemptiveLocker.Mode].
func ContextWithMode(ctx context.Context, mode ClaimMode) context.Context {
	t := termsFromContext(ctx)
	t.mode, t.moded = mode, true
	return contextWithTerms(ctx, t)
}

// ModeFromContext returns the mode that [ContextWithMode] has set, or [Preempt] if there is none.
// Notify and Lock of a custom provider's locks can use it.
func ModeFromContext(ctx context.Context) ClaimMode { return termsFromContext(ctx).mode }

// ContextWithLabels returns a context that carries the labels of a claim to Notify and Lock of a
// [PreemptableLock], through any providers in between. With a PreemptiveLocker use
// [PreemptiveLocker.Labels].
func ContextWithLabels(ctx context.Context, labels map[string]string) context.Context {
	t := termsFromContext(ctx)
	t.labels = encodeLabels(labels)
	return contextWithTerms(ctx, t)
}

// LabelsFromContext returns a copy of the labels that [ContextWithLabels] has set, or nil if there
// are none.
func LabelsFromContext(ctx context.Context) map[string]string {
	return decodeLabels(termsFromContext(ctx).labels)
}

// encodeLabels returns the labels as JSON. Characters that PostgreSQL cannot store are replaced, as
// in events.
func encodeLabels(labels map[string]string) string {
	if len(labels) == 0 {
		return ""
	}
	clean := make(map[string]string, len(labels))
	for k, v := range labels {
		clean[cleanText(k)] = cleanText(v)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	// Strings can always be encoded.
	_ = e.Encode(clean)
	return strings.TrimSuffix(b.String(), "\n")
}

// decodeLabels returns nil for text that is not an object of strings.
func decodeLabels(text string) map[string]string {
	if text == "" {
		return nil
	}
	var labels map[string]string
	if json.Unmarshal([]byte(text), &labels) != nil || len(labels) == 0 {
		return nil
	}
	return labels
}

// outdated returns the error of a claim whose sequence number is not above top, the highest. A
// claim announced top at since, which is zero if the newest claim has another number or none.
func outdated(key int64, sequence, top int64, since time.Time, newest *ClaimInfo) error {
	c := &ConflictError{Key: key, Winner: newest, Err: ErrClaimOutdated}
	if sequence == top {
		c.detail = fmt.Sprintf("a claim with the same sequence number %d is not over (newest claim: %q)", sequence, newest.Event)
		return c
	}
	when := "before the newest claim"
	if !since.IsZero() {
		when = "at " + since.UTC().Format(time.RFC3339)
	}
	c.detail = fmt.Sprintf("sequence number %d is %d below the highest, %d, which was announced %s (newest claim: %q); if that one is wrong, ResetSequence forgets it",
		sequence, uint64(top)-uint64(sequence), top, when, newest.Event)
	return c
}
