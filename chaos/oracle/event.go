// Package oracle judges the events that the processes of a chaos run have recorded. It consists of
// pure functions over a history of events.
package oracle

import (
	"cmp"
	"slices"
	"time"
)

// Kind is the kind of an event.
type Kind string

// The events of a worker about each of its claims, in this order. Every claim begins with Attempt
// and finishes with Ended, unless its worker is killed.
const (
	Attempt    Kind = "attempt"    // How is HowDirect, HowSilent or HowDo
	Announcing Kind = "announcing" // Notify was called (direct claims only)
	Announced  Kind = "announced"  // Notify has returned nil (direct claims only)
	Waiting    Kind = "waiting"    // Lock was called (not with HowDo)
	Locked     Kind = "locked"     // Lock has returned a hold, with Token
	Begin      Kind = "begin"      // the lock delay has passed, and the worker believes that it is alone
	Write      Kind = "write"      // a write to the fenced resource with Token, from Start to At
	Notified   Kind = "notified"   // the notification was received, and Class is the reason
	Over       Kind = "over"       // the lock's channel was seen to be closed
	Releasing  Kind = "releasing"  // Unlock is about to be called, or the function given to Do returns
	Ended      Kind = "ended"      // nothing is left of the claim, and Class is how it ended
)

// The events of a worker about itself.
const (
	Hello Kind = "hello" // Timeout is the session timeout
	Bye   Kind = "bye"   // the provider is closed, and Count goroutines are left over

	Suspended   Kind = "suspended"   // the provider's session is suspended, with Count holds
	Reconnected Kind = "reconnected" // the session has reconnected: Count holds were kept, Lost were lost
)

// The events of the driver.
const (
	Killed Kind = "killed" // Worker was killed, and its claims end here
	Frozen Kind = "frozen" // Worker was stopped
	Thawed Kind = "thawed" // Worker continues
	Inject Kind = "inject" // the fault Fault begins, and ID identifies this instance of it
	Heal   Kind = "heal"   // the fault ID has ended, or, with ClassFailed, could not be injected or healed
	Forget Kind = "forget" // the database may have forgotten something, and Class is one of the Forget classes
)

// The ways in which a claim is made.
const (
	HowDirect = "direct" // New, Notify, Lock, Unlock
	HowSilent = "silent" // the same without Notify
	HowDo     = "do"     // PreemptiveLocker.Do
)

// The effects of a claim on others. A claim without a mode preempts.
const (
	ModeFinish = "let_finish"   // the holder is not notified
	ModeSkip   = "skip_if_busy" // it takes a key that is free and not waited for, or ends with ClassBusy
)

// Classes of Notified and Ended.
const (
	ClassReleased  = "released"   // the holder has released
	ClassDisplaced = "superseded" // a newer claim
	ClassBusy      = "busy"       // the key was held or waited for, and the claim skips
	ClassTimeout   = "timeout"
	ClassLost      = "lost" // the session is lost, or the hold was revoked
	ClassClosed    = "closed"
	ClassMax       = "max"
	ClassContext   = "context"
	ClassFailed    = "failed" // an error of the database, and nothing was held
)

// Classes of Forget.
const (
	ForgetCrash = "crash" // the newest claims may be forgotten
	ForgetRows  = "rows"  // an operator has deleted the state
	ForgetAsync = "async" // an asynchronous standby was promoted
)

// Event is one line of a history. Times are readings of the machine's monotonic clock in
// nanoseconds, which is the same for every process.
type Event struct {
	At     int64  `json:"at"`
	Kind   Kind   `json:"kind"`
	Worker string `json:"worker,omitempty"` // one process (a restarted worker has another name)
	Claim  string `json:"claim,omitempty"`
	Key    int64  `json:"key,omitempty"`
	How    string `json:"how,omitempty"`
	Mode   string `json:"mode,omitempty"` // attempt
	Token  int64  `json:"token,omitempty"`
	Start  int64  `json:"start,omitempty"`
	OK     bool   `json:"ok,omitempty"`       // write: accepted
	Belief bool   `json:"believes,omitempty"` // write: the worker has not been notified
	Class  string `json:"class,omitempty"`
	Text   string `json:"text,omitempty"`
	Count  int    `json:"count,omitempty"`

	Timeout int64 `json:"timeout,omitempty"` // hello
	Lost    int   `json:"lost,omitempty"`    // reconnected

	// inject only
	ID      int      `json:"id,omitempty"`
	Fault   string   `json:"fault,omitempty"`
	Victims []string `json:"victims,omitempty"` // the workers it hits
	Session bool     `json:"session,omitempty"` // it may keep their sessions out of contact with the server
	Cut     bool     `json:"cut,omitempty"`     // it does so from its first to its last moment
	Slow    bool     `json:"slow,omitempty"`    // it breaks no contact, but reconnecting and looking things up may take as long as it lasts
}

// Row is one write, as the resource itself has recorded it.
type Row struct {
	Seq      int64
	Key      int64
	Token    int64
	Claim    string
	Accepted bool
}

// Sort orders a history by time.
func Sort(events []Event) {
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.At, b.At) })
}

// Claim contains everything that is known about one claim. A time is 0 if the event did not happen.
type Claim struct {
	ID, Worker, How, Mode                      string
	Key, Token                                 int64
	Attempt, Announcing, Announced             int64
	Waiting, Locked, Begin, Notified, Over     int64
	Releasing, Ended                           int64
	NotifiedClass, EndClass, Text              string
	Killed                                     int64 // its worker was killed before it ended
	Writes, RejectedBelieving, RejectedKnowing int
}

// Claims groups the events of a sorted history by claim.
func Claims(events []Event) []*Claim {
	byID := map[string]*Claim{}
	byWorker := map[string][]*Claim{}
	var all []*Claim
	for i := range events {
		e := &events[i]
		if e.Kind == Killed {
			for _, c := range byWorker[e.Worker] {
				if c.Ended == 0 {
					c.Killed = e.At
				}
			}
		}
		if e.Claim == "" {
			continue
		}
		c := byID[e.Claim]
		if c == nil {
			c = &Claim{ID: e.Claim, Worker: e.Worker, Key: e.Key, How: e.How, Mode: e.Mode, Attempt: e.At}
			byID[e.Claim] = c
			byWorker[e.Worker] = append(byWorker[e.Worker], c)
			all = append(all, c)
		}
		switch e.Kind {
		case Announcing:
			c.Announcing = e.At
		case Announced:
			c.Announced = e.At
		case Waiting:
			c.Waiting = e.At
		case Locked:
			c.Locked, c.Token = e.At, e.Token
		case Begin:
			c.Begin = e.At
		case Notified:
			c.Notified, c.NotifiedClass = e.At, e.Class
		case Over:
			c.Over = e.At
		case Releasing:
			c.Releasing = e.At
		case Ended:
			c.Ended, c.EndClass, c.Text = e.At, e.Class, e.Text
		case Write:
			c.Writes++
			if !e.OK && e.Belief {
				c.RejectedBelieving++
			} else if !e.OK {
				c.RejectedKnowing++
			}
		}
	}
	return all
}

// HoldEnd returns when the claim's hold had ended as far as its worker could know: it released, its
// channel was closed, or it was killed. 0 means never.
func (c *Claim) HoldEnd() int64 {
	return first(c.Releasing, c.Over, c.Ended, c.Killed)
}

// first returns the earliest of the times that is not 0.
func first(times ...int64) int64 {
	var earliest int64
	for _, t := range times {
		if t != 0 && (earliest == 0 || t < earliest) {
			earliest = t
		}
	}
	return earliest
}

// span is a span of time. With a to of 0 it has no end.
type span struct{ from, to int64 }

func (s span) touches(from, to int64) bool {
	return s.from <= to && (s.to == 0 || s.to >= from)
}

// longer returns the span with a time of grace after it.
func (s span) longer(grace time.Duration) span {
	if s.to != 0 {
		s.to += int64(grace)
	}
	return s
}

func ms(ns int64) time.Duration { return time.Duration(ns).Round(time.Millisecond) }
