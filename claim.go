package locker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// ClaimMode says what a claim does to others while its key is held or waited for. The
// mode of the newer claim decides: that of the holder does not protect it.
type ClaimMode int

const (
	// Preempt is the default. Older waiters are superseded, and the holder is notified.
	Preempt ClaimMode = iota
	// LetFinish supersedes older waiters, too, but the holder is not notified: the claim
	// waits until it has finished. A later claim that preempts notifies the holder all
	// the same.
	LetFinish
	// SkipIfBusy makes no claim that others see. If the key is held or waited for, Lock
	// returns [ErrLockBusy] immediately. Otherwise it takes the key. A lock that waits
	// without having been announced, by a Lock without Notify, does not count.
	//
	// A key whose holder has crashed is busy until this process has watched the holder's
	// session being dead for the session timeout. The first claim begins to watch it.
	SkipIfBusy
)

// String returns a name that is fit for a metric's label: "preempt", "let_finish" or
// "skip_if_busy".
func (m ClaimMode) String() string {
	names := [...]string{"preempt", "let_finish", "skip_if_busy"}
	if m < 0 || int(m) >= len(names) {
		return fmt.Sprintf("ClaimMode(%d)", int(m))
	}
	return names[m]
}

// MarshalText returns what String does, and an error for an unknown mode.
func (m ClaimMode) MarshalText() ([]byte, error) {
	return []byte(m.String()), (terms{mode: m}).check()
}

// UnmarshalText accepts what String returns, for flags and configuration files.
func (m *ClaimMode) UnmarshalText(text []byte) error {
	for known := Preempt; known <= SkipIfBusy; known++ {
		if known.String() == string(text) {
			*m = known
			return nil
		}
	}
	return fmt.Errorf("locker: unknown claim mode %q: want %q, %q or %q", text, Preempt, LetFinish, SkipIfBusy)
}

// terms are what a caller says about its claim, besides the event. They travel in the
// context, through providers of any kind.
type terms struct {
	sequence *int64
	mode     ClaimMode
	moded    bool          // mode was given
	labels   string        // as JSON; "" if there are none
	wait     time.Duration // of PreemptiveLocker.Wait, for a lock behind a provider of another kind; 0 if there is none
}

type termsKey struct{}

func termsFromContext(ctx context.Context) terms {
	if t, ok := ctx.Value(termsKey{}).(*terms); ok {
		return *t
	}
	return terms{}
}

func contextWithTerms(ctx context.Context, t terms) context.Context {
	if t == (terms{}) {
		return ctx
	}
	return context.WithValue(ctx, termsKey{}, &t)
}

// over returns the terms t, completed by others.
func (t terms) over(others terms) terms {
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

// ContextWithSequence gives a claim's sequence number to a PreemptableLock's Notify,
// through whatever providers lie in between. With a PreemptiveLocker, use its method
// [PreemptiveLocker.Sequence]. Every claim that is made with the context, or one derived
// from it, has the number, unless it is given another one.
func ContextWithSequence(ctx context.Context, sequence int64) context.Context {
	t := termsFromContext(ctx)
	t.sequence = &sequence
	return contextWithTerms(ctx, t)
}

// SequenceFromContext returns the number that [ContextWithSequence] has put there. A
// provider of your own can use it in Notify to turn away what comes too late.
func SequenceFromContext(ctx context.Context) (sequence int64, ok bool) {
	if s := termsFromContext(ctx).sequence; s != nil {
		return *s, true
	}
	return 0, false
}

// ContextWithMode gives a claim's mode to a PreemptableLock's Notify and Lock, through
// whatever providers lie in between. With a PreemptiveLocker, use its method
// [PreemptiveLocker.Mode]. In the mode [SkipIfBusy] Notify does nothing, and Lock
// decides.
func ContextWithMode(ctx context.Context, mode ClaimMode) context.Context {
	t := termsFromContext(ctx)
	t.mode, t.moded = mode, true
	return contextWithTerms(ctx, t)
}

// ModeFromContext returns the mode that [ContextWithMode] has put there, or [Preempt].
// A provider of your own can use it in Notify and Lock.
func ModeFromContext(ctx context.Context) ClaimMode { return termsFromContext(ctx).mode }

// ContextWithLabels gives a claim's labels to a PreemptableLock's Notify and Lock,
// through whatever providers lie in between. With a PreemptiveLocker, use its method
// [PreemptiveLocker.Labels].
func ContextWithLabels(ctx context.Context, labels map[string]string) context.Context {
	t := termsFromContext(ctx)
	t.labels = encodeLabels(labels)
	return contextWithTerms(ctx, t)
}

// LabelsFromContext returns a copy of the labels that [ContextWithLabels] has put there.
func LabelsFromContext(ctx context.Context) map[string]string {
	return decodeLabels(termsFromContext(ctx).labels)
}

// encodeLabels returns the labels as JSON, made fit for PostgreSQL as events are.
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
	_ = e.Encode(clean) // strings can always be encoded
	return strings.TrimSuffix(b.String(), "\n")
}

// decodeLabels returns nil for what is no object of strings.
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

// outdated returns the error of a claim whose sequence number is not above top, the
// highest. That was announced at since, which is zero if the newest claim has another
// number or none.
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
