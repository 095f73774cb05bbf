package oracle

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// s returns a time in a history, in seconds after an arbitrary moment.
func s(seconds float64) int64 { return int64(1000*time.Second) + int64(seconds*float64(time.Second)) }

// story builds a history. Claims are named by worker and number: "a1" is a claim of worker a.
type story []Event

func (h *story) add(at float64, kind Kind, claim string, more func(*Event)) *story {
	e := Event{At: s(at), Kind: kind, Claim: claim, Key: 1}
	if claim != "" {
		e.Worker = claim[:1]
	}
	if more != nil {
		more(&e)
	}
	*h = append(*h, e)
	return h
}

// claim announces a claim at a time and begins to wait.
func (h *story) claim(at float64, claim string) *story {
	h.add(at, Attempt, claim, func(e *Event) { e.How = HowDirect })
	h.add(at+0.01, Announcing, claim, nil)
	h.add(at+0.02, Announced, claim, nil)
	return h.add(at+0.03, Waiting, claim, nil)
}

func (h *story) locked(at float64, claim string, token int64) *story {
	h.add(at, Locked, claim, func(e *Event) { e.Token = token })
	return h.add(at, Begin, claim, nil)
}

func (h *story) notified(at float64, claim, class string) *story {
	return h.add(at, Notified, claim, func(e *Event) { e.Class = class })
}

func (h *story) lost(at float64, claim string) *story {
	h.notified(at, claim, ClassLost).add(at, Over, claim, nil)
	return h.ended(at+0.01, claim, ClassLost)
}

func (h *story) released(at float64, claim, class string) *story {
	h.add(at, Releasing, claim, nil)
	return h.ended(at+0.01, claim, class)
}

func (h *story) ended(at float64, claim, class string) *story {
	return h.add(at, Ended, claim, func(e *Event) { e.Class = class })
}

func (h *story) write(at float64, claim string, token int64, ok, belief bool) *story {
	return h.add(at, Write, claim, func(e *Event) { e.Start, e.Token, e.OK, e.Belief = s(at-0.01), token, ok, belief })
}

func (h *story) of(at float64, kind Kind, worker, class string) *story {
	return h.add(at, kind, "", func(e *Event) { e.Key, e.Worker, e.Class = 0, worker, class })
}

// inject adds a fault that keeps sessions out of contact.
func (h *story) inject(at, heal float64, victims ...string) *story {
	return h.fault(at, heal, func(e *Event) { e.Session, e.Victims = true, victims })
}

// cut adds a fault that does so all the time. With a heal of 0 it never ends.
func (h *story) cut(at, heal float64, victims ...string) *story {
	return h.fault(at, heal, func(e *Event) { e.Cut, e.Victims = true, victims })
}

func (h *story) fault(at, heal float64, more func(*Event)) *story {
	id := len(*h) + 1
	h.add(at, Inject, "", func(e *Event) { e.Key, e.ID, e.Fault = 0, id, "f"; more(e) })
	if heal == 0 {
		return h
	}
	return h.add(heal, Heal, "", func(e *Event) { e.Key, e.ID = 0, id })
}

// do adds a claim through Do.
func (h *story) do(at float64, claim string) *story {
	return h.add(at, Attempt, claim, func(e *Event) { e.How = HowDo })
}

// silent adds a claim that is not announced.
func (h *story) silent(at float64, claim string) *story {
	h.add(at, Attempt, claim, func(e *Event) { e.How = HowSilent })
	return h.add(at+0.01, Waiting, claim, nil)
}

// displaced returns the ordinary history of two claims: the second supersedes the first.
func displaced() *story {
	h := &story{}
	h.claim(0, "a1").locked(0.1, "a1", 10).write(0.2, "a1", 10, true, true)
	h.claim(1, "b1").notified(1.1, "a1", ClassDisplaced).released(1.4, "a1", ClassDisplaced)
	return h.locked(1.5, "b1", 20).released(2, "b1", ClassReleased)
}

// example is a history and the violations in it.
type example struct {
	name    string
	history *story
	want    []string // rules that are broken
	excused []string
}

func check(t *testing.T, examples []example) {
	t.Helper()
	for _, c := range examples {
		t.Run(c.name, func(t *testing.T) {
			rules := DefaultRules()
			rules.GrantTime = func(token int64) (int64, bool) { return token, token > 1000 }
			v := Check(*c.history, rules)
			var broken, excused []string
			for _, x := range v.Violations {
				broken = append(broken, x.Rule)
			}
			for _, x := range v.Excused {
				excused = append(excused, x.Why)
			}
			if !slices.Equal(broken, c.want) || !slices.Equal(excused, c.excused) {
				t.Errorf("broken: %q, want %q; excused: %q, want %q\n%v", broken, c.want, excused, c.excused, v.Violations)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	check(t, []example{
		{"one claim displaces another", displaced(), nil, nil},
		{"an older waiter leaves", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).claim(1, "b1").claim(1.5, "c1").
			ended(1.6, "b1", ClassDisplaced).notified(1.1, "a1", ClassDisplaced).released(3, "a1", ClassReleased).
			locked(3.1, "c1", 2).released(4, "c1", ClassReleased), nil, nil},
		{"two hold at a time", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).claim(1, "b1").locked(1.2, "b1", 2).
			notified(1.3, "a1", ClassDisplaced).released(1.9, "a1", ClassDisplaced).released(2, "b1", ClassReleased), []string{RuleExclusion}, nil},
		{"a notified holder still holds", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).claim(1, "b1").notified(1.1, "a1", ClassDisplaced).
			locked(1.2, "b1", 2).released(1.9, "a1", ClassDisplaced).released(2, "b1", ClassReleased), []string{RuleExclusion}, nil},
		{"frozen past the lease, and notified immediately when it goes on", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).
			of(1, Frozen, "a", "").claim(12, "b1").locked(16, "b1", 2).of(21, Thawed, "a", "").lost(21.1, "a1").
			released(22, "b1", ClassReleased), nil, []string{ExcuseFrozen}},
		{"frozen, and not notified for long when it goes on", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).
			of(1, Frozen, "a", "").claim(16, "b1").locked(17, "b1", 2).of(21, Thawed, "a", "").lost(23.5, "a1").
			released(25, "b1", ClassReleased), []string{RuleExclusion, RuleLost}, nil},
		{"killed while it held", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).of(1, Killed, "a", "").
			claim(2, "b1").locked(11.1, "b1", 2).released(12, "b1", ClassReleased), nil, nil},
		{"a token that does not grow", (&story{}).claim(0, "a1").locked(0.1, "a1", 5).released(1, "a1", ClassReleased).
			claim(2, "b1").locked(2.1, "b1", 4).released(3, "b1", ClassReleased), []string{RuleTokenOrder}, nil},
		{"one token twice", (&story{}).claim(0, "a1").locked(0.1, "a1", 5).released(1, "a1", ClassReleased).
			claim(2, "b1").locked(2.1, "b1", 5).released(3, "b1", ClassReleased), []string{RuleTokenOrder, RuleTokenOrder}, nil},
		{"an older claim is granted", (&story{}).claim(0, "a1").claim(1, "b1").locked(2, "a1", int64(s(2))).
			released(2.5, "a1", ClassReleased).locked(2.6, "b1", int64(s(2.6))).released(3, "b1", ClassReleased), []string{RuleNewest}, nil},
		{"the same, but the server crashed", (&story{}).claim(0, "a1").claim(1, "b1").of(1.5, Forget, "", ForgetCrash).locked(2, "a1", int64(s(2))).
			released(2.5, "a1", ClassReleased).locked(2.6, "b1", int64(s(2.6))).released(3, "b1", ClassReleased), nil, []string{ExcuseCrash}},
		{"a grant that was under way", (&story{}).claim(0, "a1").claim(1, "b1").locked(2, "a1", int64(s(0.9))).notified(2.1, "a1", ClassDisplaced).
			released(2.5, "a1", ClassDisplaced).locked(2.6, "b1", int64(s(2.6))).released(3, "b1", ClassReleased), nil, nil},
		{"a holder that is never notified", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).claim(1, "b1").released(7, "a1", ClassReleased).
			locked(7.1, "b1", 2).released(8, "b1", ClassReleased), []string{RuleHolder}, nil},
		{"the same, but its session may be gone", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).inject(0.5, 2, "a").claim(1, "b1").
			released(7, "a1", ClassReleased).locked(7.1, "b1", 2).released(8, "b1", ClassReleased), nil, nil},
		{"a waiter that does not leave", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).claim(1, "b1").notified(1.1, "a1", ClassDisplaced).claim(2, "c1").
			released(3, "a1", ClassReleased).locked(3.1, "c1", 2).ended(7, "b1", ClassDisplaced).released(8, "c1", ClassReleased), []string{RuleWaiter}, nil},
		{"a wait without end", (&story{}).claim(0, "a1"), []string{RuleHang, RuleHang}, nil},
		{"a wait that is too long", (&story{}).claim(0, "a1").ended(20, "a1", ClassTimeout), []string{RuleHang, RuleStuck}, nil},
		{"a release that is too long", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).add(1, Releasing, "a1", nil).ended(9, "a1", ClassReleased), []string{RuleHang}, nil},
		{"not revoked", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).claim(1, "b1").notified(1.1, "a1", ClassDisplaced).released(6, "a1", ClassDisplaced).
			locked(6.1, "b1", 2).released(7, "b1", ClassReleased), []string{RuleRevoked}, nil},
		{"refused for no reason", displaced().write(1.9, "b1", 20, false, true), []string{RuleRejected}, nil},
		{"refused after it was notified", displaced().write(1.35, "a1", 10, false, false), nil, nil},
		{"notified and still cleaning up in Do", (&story{}).add(0, Attempt, "a1", func(e *Event) { e.How = HowDo }).locked(0.1, "a1", 1).claim(1, "b1").
			notified(1.1, "a1", ClassDisplaced).locked(1.2, "b1", 2).released(1.3, "a1", ClassDisplaced).released(2, "b1", ClassReleased), []string{RuleExclusion}, nil},
		{"goroutines are left", displaced().add(9, Bye, "", func(e *Event) { e.Worker, e.Count = "a", 2 }), []string{RuleLeak}, nil},
	})
}

// TestSuspended tests that a hold outlives every outage that its process survives, and no other.
func TestSuspended(t *testing.T) {
	held := func() *story { return (&story{}).claim(0, "a1").locked(0.1, "a1", 1) }
	check(t, []example{
		{"out of contact for too long", held().cut(1, 30, "a").lost(9.5, "a1"), nil, nil},
		{"the same, but the holder learns of it late", held().cut(1, 30, "a").lost(11.5, "a1"), []string{RuleLost}, nil},
		{"the same, in Do", (&story{}).do(0, "a1").locked(0.1, "a1", 1).cut(1, 30, "a").notified(11.5, "a1", ClassLost).released(11.6, "a1", ClassLost), []string{RuleLost}, nil},
		{"the same, and the holder never learns of it", held().cut(1, 0, "a").released(20, "a1", ClassReleased), []string{RuleLost}, nil},
		{"a fault that may break contact and may not", held().inject(1, 30, "a").released(20, "a1", ClassReleased), nil, nil},
		{"contact is back in time", held().cut(1, 8, "a").released(20, "a1", ClassReleased), nil, nil},
		{"contact is back just too late", held().cut(1, 6, "a").lost(7.5, "a1"), nil, nil},
		{"lost though contact was soon back", held().cut(1, 3, "a").lost(3.1, "a1"), []string{RuleKept}, nil},
		{"lost immediately", held().cut(1, 30, "a").lost(1.1, "a1"), []string{RuleKept}, nil},
		{"lost long after contact was back", held().cut(1, 3, "a").lost(9, "a1"), []string{RuleKept}, nil},
		{"lost to the fault of another", held().cut(1, 30, "b").lost(9, "a1"), []string{RuleKept}, nil},
		{"lost without a notification", held().cut(1, 2, "a").add(2.5, Releasing, "a1", nil).ended(2.6, "a1", ClassLost), []string{RuleKept}, nil},
		{"two faults that leave no time between them", held().cut(1, 4, "a").cut(5, 8, "a").lost(8.5, "a1"), nil, nil},
		{"two faults that leave time between them", held().cut(1, 3, "a").cut(8, 11, "a").lost(11, "a1"), []string{RuleKept}, nil},
		{"a fault that breaks no contact", held().fault(1, 30, func(e *Event) { e.Slow, e.Victims = true, []string{"a"} }).lost(9, "a1"), []string{RuleKept}, nil},
		{"the same, but something else did", held().cut(1, 2, "a").fault(2, 30, func(e *Event) { e.Slow, e.Victims = true, []string{"a"} }).lost(9, "a1"), nil, nil},
		{"a longer session timeout", held().add(0, Hello, "", func(e *Event) { e.Worker, e.Timeout = "a", int64(time.Minute) }).cut(1, 30, "a").lost(9.5, "a1"), []string{RuleKept}, nil},
		{"its row was deleted", held().of(1, Forget, "", ForgetRows).lost(3, "a1"), nil, nil},
		{"stopped for a short time and lost", held().of(1, Frozen, "a", "").of(5, Thawed, "a", "").lost(5.1, "a1"), []string{RuleKept}, nil},
		{"stopped for a long time, and it holds on", held().of(1, Frozen, "a", "").of(21, Thawed, "a", "").released(25, "a1", ClassReleased), []string{RuleLost}, nil},
		{"stopped for a short time, and another took the key", held().of(1, Frozen, "a", "").silent(1, "b1").locked(4, "b1", 2).of(5, Thawed, "a", "").
			lost(5.1, "a1").released(6, "b1", ClassReleased), []string{RuleExclusion, RuleKept}, nil},
		{"taken from while it was suspended", held().cut(1, 4, "a").silent(1, "b1").locked(4, "b1", 2).released(5, "b1", ClassReleased).released(6, "a1", ClassReleased), []string{RuleExclusion}, nil},
		{"taken from after it was lost", held().cut(1, 30, "a").silent(1, "b1").lost(9.8, "a1").locked(11, "b1", 2).released(12, "b1", ClassReleased), nil, nil},
		{"its row was deleted, and it held on", held().of(1, Forget, "", ForgetRows).silent(1, "b1").locked(4, "b1", 2).released(5, "b1", ClassReleased).
			released(6, "a1", ClassReleased), []string{RuleExclusion}, nil},
	})
}

// TestPatience tests that a claim waits for the end of a temporary fault until its own bound.
func TestPatience(t *testing.T) {
	// a and b have worked. Then there is a fault.
	worked := func() *story { return displaced().cut(3, 6, "a", "b") }
	check(t, []example{
		{"a wait fails", worked().claim(4, "a2").ended(5, "a2", ClassFailed), []string{RuleFailed}, nil},
		{"a wait fails without a fault", displaced().claim(4, "a2").ended(5, "a2", ClassFailed), []string{RuleFailed}, nil},
		{"an announcement fails", worked().add(4, Attempt, "a2", nil).add(4, Announcing, "a2", nil).ended(5, "a2", ClassContext), []string{RuleFailed}, nil},
		{"Do fails", worked().do(4, "a2").ended(5, "a2", ClassFailed), []string{RuleFailed}, nil},
		{"a wait times out too early", worked().claim(4, "a2").ended(10, "a2", ClassTimeout), []string{RuleFailed}, nil},
		{"a wait is lost", worked().claim(4, "a2").ended(5, "a2", ClassLost), []string{RuleFailed}, nil},
		{"a wait times out", worked().claim(4, "a2").ended(21.5, "a2", ClassTimeout), nil, nil},
		{"a wait gets its key", worked().claim(4, "a2").locked(7, "a2", int64(s(7))).released(8, "a2", ClassReleased), nil, nil},
		{"an announcement comes to its bound", worked().add(4, Attempt, "a2", nil).add(4, Announcing, "a2", nil).ended(19, "a2", ClassContext), nil, nil},
		{"the first use fails", (&story{}).cut(3, 6, "c").claim(4, "c1").add(4, Attempt, "c2", nil).ended(4.01, "c2", ClassFailed).ended(21.5, "c1", ClassTimeout), nil, nil},
		{"a release fails", worked().claim(2.1, "a2").locked(2.2, "a2", int64(s(2.2))).add(4, Releasing, "a2", nil).ended(5, "a2", ClassFailed), []string{RuleFailed}, nil},
		{"a release comes to its bound", worked().claim(2.1, "a2").locked(2.2, "a2", int64(s(2.2))).add(4, Releasing, "a2", nil).ended(9, "a2", ClassFailed), nil, nil},
	})
}

// TestSuperseded tests that a claim is superseded only by a newer claim.
func TestSuperseded(t *testing.T) {
	check(t, []example{
		{"by itself", (&story{}).claim(0, "a1").ended(1, "a1", ClassDisplaced), []string{RuleSuperseded}, nil},
		{"by one that disturbs none", (&story{}).silent(0.5, "b1").claim(0.6, "a1").ended(1, "a1", ClassDisplaced).locked(1, "b1", 1).released(2, "b1", ClassReleased), []string{RuleSuperseded}, nil},
		{"by an older one", (&story{}).claim(0, "b1").claim(1, "a1").ended(2, "a1", ClassDisplaced).locked(2, "b1", 1).released(3, "b1", ClassReleased), []string{RuleSuperseded}, nil},
		{"a holder, by none", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).notified(1, "a1", ClassDisplaced).released(1.1, "a1", ClassDisplaced), []string{RuleSuperseded}, nil},
		{"by a newer one", displaced(), nil, nil},
		{"one that is not announced, by one that an asynchronous standby had forgotten", (&story{}).claim(0, "b1").of(1, Forget, "", ForgetAsync).silent(1.5, "a1").
			ended(2, "a1", ClassDisplaced).locked(2, "b1", 1).released(3, "b1", ClassReleased), nil, []string{ExcuseAsync}},
		{"one that is announced, by the same", (&story{}).claim(0, "b1").of(1, Forget, "", ForgetAsync).claim(1.5, "a1").
			ended(2, "a1", ClassDisplaced).locked(2, "b1", 1).released(3, "b1", ClassReleased), []string{RuleSuperseded}, nil},
		{"by one whose announcement was not confirmed", (&story{}).claim(1, "a1").add(0, Attempt, "b1", nil).add(0, Announcing, "b1", nil).of(0.5, Killed, "b", "").
			ended(2, "a1", ClassDisplaced), nil, nil},
	})
}

// TestSuccessors tests that the key of a process that died is taken over in time, and not before.
func TestSuccessors(t *testing.T) {
	killed := func() *story {
		return (&story{}).claim(0, "a1").locked(0.1, "a1", 1).of(1, Killed, "a", "")
	}
	check(t, []example{
		{"too early", killed().claim(2, "b1").locked(2.1, "b1", 2).released(3, "b1", ClassReleased), []string{RuleEarly}, nil},
		{"only the first is too early", killed().claim(2, "b1").locked(2.1, "b1", 2).released(3, "b1", ClassReleased).
			claim(4, "b2").locked(4.1, "b2", 3).released(5, "b2", ClassReleased), []string{RuleEarly}, nil},
		{"in time", killed().claim(2, "b1").locked(11, "b1", 2).released(12, "b1", ClassReleased), nil, nil},
		{"after a clean end", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).released(0.5, "a1", ClassReleased).of(1, Killed, "a", "").
			claim(2, "b1").locked(2.1, "b1", 2).released(3, "b1", ClassReleased), nil, nil},
		{"while it released", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).add(0.9, Releasing, "a1", nil).of(1, Killed, "a", "").
			claim(2, "b1").locked(2.1, "b1", 2).released(3, "b1", ClassReleased), nil, nil},
		{"its session was dead before", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).cut(0.5, 0, "a").of(8, Killed, "a", "").
			claim(9, "b1").locked(11, "b1", 2).released(12, "b1", ClassReleased), nil, nil},
		{"a session with another timeout", killed().add(0, Hello, "", func(e *Event) { e.Worker, e.Timeout = "a", int64(2*time.Second) }).
			claim(2, "b1").locked(3, "b1", 2).released(4, "b1", ClassReleased), nil, nil},
		{"never", killed().claim(2, "b1").ended(19.1, "b1", ClassTimeout), []string{RuleStuck}, nil},
		{"not before the waiter gives up", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).silent(0.2, "b1").of(8, Killed, "a", "").ended(17.3, "b1", ClassTimeout), nil, nil},
		{"another holds it", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).silent(0.2, "b1").ended(17.3, "b1", ClassTimeout).released(18, "a1", ClassReleased), nil, nil},
		{"a release that was forgotten", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).released(0.5, "a1", ClassReleased).silent(1, "b1").
			ended(18.1, "b1", ClassTimeout), []string{RuleStuck}, nil},
		{"the same, and the waiters change", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).released(0.5, "a1", ClassReleased).claim(1, "b1").
			claim(8, "b2").ended(8.1, "b1", ClassDisplaced).claim(13, "b3").ended(13.1, "b2", ClassDisplaced).claim(16, "b4").ended(16.1, "b3", ClassDisplaced).
			locked(16.2, "b4", 2).released(17, "b4", ClassReleased), []string{RuleStuck}, nil},
		{"waiters of another process", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).released(0.5, "a1", ClassReleased).claim(1, "b1").
			claim(8, "c2").ended(8.1, "b1", ClassDisplaced).locked(16.2, "c2", 2).released(17, "c2", ClassReleased), nil, nil},
		{"a release that is under way", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).cut(0.4, 9, "a").add(0.5, Releasing, "a1", nil).ended(5.5, "a1", ClassFailed).silent(1, "b1").
			ended(18.1, "b1", ClassTimeout), nil, nil},
		{"the waiter is disturbed", (&story{}).silent(1, "b1").cut(2, 4, "b").ended(18.1, "b1", ClassTimeout), nil, nil},
	})
}

// TestFigures tests the figures, which break no rule.
func TestFigures(t *testing.T) {
	h := (&story{}).claim(0, "a1").locked(0.1, "a1", 1).cut(1, 30, "a", "b").lost(9.5, "a1")
	h.claim(0.1, "b1").locked(0.2, "b1", 2)
	(*h)[len(*h)-1].Key = 2
	h.add(1.1, Suspended, "", func(e *Event) { e.Worker, e.Count = "a", 1 }).add(31.1, Reconnected, "", func(e *Event) { e.Worker, e.Lost = "a", 1 })
	h.claim(40, "a2").locked(40.1, "a2", 3).cut(41, 43, "a").released(44, "a2", ClassReleased)
	v := Check(*h, DefaultRules())
	if len(v.Detection) != 1 || v.Detection[0].Took != 8500*time.Millisecond {
		t.Error(v.Detection)
	}
	if len(v.Survival) != 2 || v.Survival[0].Lost != 1 || v.Survival[1].Kept != 1 || v.Survival[1].Lost != 0 {
		t.Error(v.Survival)
	}
	if v.Suspended != 1 || len(v.Absences) != 1 || v.Absences[0] != 30*time.Second {
		t.Error(v.Suspended, v.Absences)
	}
}

func TestResource(t *testing.T) {
	row := func(seq, token int64, accepted bool) Row {
		return Row{seq, 1, token, fmt.Sprintf("a%d", token), accepted}
	}
	good := []Row{row(1, 5, true), row(2, 7, true), row(3, 5, false), row(4, 7, true)}
	bad := []Row{row(1, 5, true), row(2, 7, true), row(3, 5, true)}
	if v := CheckRows(good); len(v) != 0 {
		t.Error(v)
	}
	if v := CheckRows(bad); len(v) != 1 || v[0].Rule != RuleFence {
		t.Error(v)
	}
	for _, c := range []struct {
		name   string
		events *story
		rows   []Row
		want   bool
	}{
		{"as it should be", (&story{}).write(1, "a5", 5, true, true).write(2, "a7", 7, true, true).write(3, "a5", 5, false, true), good[:3], true},
		{"accepts an older token", (&story{}).write(1, "a5", 5, true, true).write(2, "a7", 7, true, true).write(3, "a5", 5, true, true), bad, false},
		{"refuses a newer token", (&story{}).write(1, "a5", 5, true, true).write(2, "a7", 7, false, true), nil, false},
		{"an answer that died with its worker", (&story{}).write(1, "a5", 5, true, true).write(3, "a5", 5, false, true), good[:3], true},
	} {
		if got := CheckResource(*c.events, c.rows, time.Minute); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
