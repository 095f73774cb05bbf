package oracle

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// s is a time in a history, in seconds after an arbitrary moment.
func s(seconds float64) int64 { return int64(1000*time.Second) + int64(seconds*float64(time.Second)) }

// story is a history in the making. Claims are named by worker and number:
// "a1" is worker a's.
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

// claim announces at a time and begins to wait.
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

func (h *story) inject(at, heal, bound float64, victims ...string) *story {
	h.add(at, Inject, "", func(e *Event) {
		e.Key, e.ID, e.Fault, e.Victims, e.Session, e.Bound = 0, 1, "f", victims, true, int64(bound*float64(time.Second))
	})
	return h.add(heal, Heal, "", func(e *Event) { e.Key, e.ID = 0, 1 })
}

// displaced is the ordinary life of two claims: the second displaces the first.
func displaced() *story {
	h := &story{}
	h.claim(0, "a1").locked(0.1, "a1", 10).write(0.2, "a1", 10, true, true)
	h.claim(1, "b1").notified(1.1, "a1", ClassDisplaced).released(1.4, "a1", ClassDisplaced)
	return h.locked(1.5, "b1", 20).released(2, "b1", ClassReleased)
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name    string
		history *story
		want    []string // rules that are broken
		excused []string
	}{
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
			of(1, Frozen, "a", "").claim(16, "b1").locked(17, "b1", 2).of(21, Thawed, "a", "").lost(25, "a1").
			released(25, "b1", ClassReleased), []string{RuleExclusion}, nil},
		{"killed while it held", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).of(1, Killed, "a", "").
			claim(2, "b1").locked(2.1, "b1", 2).released(3, "b1", ClassReleased), nil, nil},
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
		{"the same, but its session may be gone", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).inject(0.5, 2, 0, "a").claim(1, "b1").
			released(7, "a1", ClassReleased).locked(7.1, "b1", 2).released(8, "b1", ClassReleased), nil, nil},
		{"a waiter that does not leave", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).claim(1, "b1").notified(1.1, "a1", ClassDisplaced).claim(2, "c1").
			released(3, "a1", ClassReleased).locked(3.1, "c1", 2).ended(7, "b1", ClassDisplaced).released(8, "c1", ClassReleased), []string{RuleWaiter}, nil},
		{"a session is lost", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).inject(1, 30, 9, "a").lost(9.5, "a1"), nil, nil},
		{"a session is lost and the holder learns of it late", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).inject(1, 30, 9, "a").lost(11.5, "a1"), []string{RuleLost}, nil},
		{"a wait without end", (&story{}).claim(0, "a1"), []string{RuleHang, RuleHang}, nil},
		{"a wait that is too long", (&story{}).claim(0, "a1").ended(11, "a1", ClassTimeout), []string{RuleHang}, nil},
		{"a release that is too long", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).add(1, Releasing, "a1", nil).ended(9, "a1", ClassReleased), []string{RuleHang}, nil},
		{"not revoked", (&story{}).claim(0, "a1").locked(0.1, "a1", 1).claim(1, "b1").notified(1.1, "a1", ClassDisplaced).released(6, "a1", ClassDisplaced).
			locked(6.1, "b1", 2).released(7, "b1", ClassReleased), []string{RuleRevoked}, nil},
		{"refused for no reason", displaced().write(1.9, "b1", 20, false, true), []string{RuleRejected}, nil},
		{"refused after it was notified", displaced().write(1.35, "a1", 10, false, false), nil, nil},
		{"notified and still cleaning up in Do", (&story{}).add(0, Attempt, "a1", func(e *Event) { e.How = HowDo }).locked(0.1, "a1", 1).claim(1, "b1").
			notified(1.1, "a1", ClassDisplaced).locked(1.2, "b1", 2).released(1.3, "a1", ClassDisplaced).released(2, "b1", ClassReleased), []string{RuleExclusion}, nil},
		{"the same, but its session may be gone", (&story{}).add(0, Attempt, "a1", func(e *Event) { e.How = HowDo }).locked(0.1, "a1", 1).claim(1, "b1").inject(1.1, 2, 0, "a").
			notified(1.1, "a1", ClassDisplaced).locked(1.2, "b1", 2).released(1.3, "a1", ClassDisplaced).released(2, "b1", ClassReleased), nil, []string{ExcuseDrain}},
		{"fails during a fault", (&story{}).claim(0, "a1").inject(0.5, 2, 0, "a").ended(1, "a1", ClassFailed), nil, nil},
		{"fails without a fault", (&story{}).claim(0, "a1").inject(0.5, 2, 0, "b").ended(1, "a1", ClassFailed), []string{RuleFailed}, nil},
		{"goroutines are left", displaced().add(9, Bye, "", func(e *Event) { e.Worker, e.Count = "a", 2 }), []string{RuleLeak}, nil},
	} {
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

func TestDetection(t *testing.T) {
	h := (&story{}).claim(0, "a1").locked(0.1, "a1", 1).inject(1, 30, 9, "a").lost(9.5, "a1")
	v := Check(*h, DefaultRules())
	if len(v.Detection) != 1 || v.Detection[0].Took != 8500*time.Millisecond {
		t.Error(v.Detection)
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
