package oracle

import (
	"fmt"
	"testing"
	"time"
)

// finish announces a claim that lets the holder finish.
func (h *story) finish(at float64, claim string) *story {
	begin := len(*h)
	h.claim(at, claim)
	(*h)[begin].Mode = ModeFinish
	return h
}

// skip adds a claim that skips a busy key.
func (h *story) skip(at float64, claim string) *story {
	h.add(at, Attempt, claim, func(e *Event) { e.How, e.Mode = HowDirect, ModeSkip })
	return h.add(at+0.01, Waiting, claim, nil)
}

func TestModes(t *testing.T) {
	held := func() *story { return (&story{}).claim(0, "a1").locked(0.1, "a1", int64(s(0.1))) }
	waited := func() *story { return held().finish(1, "b1").released(4, "a1", ClassReleased) }
	check(t, []example{
		{"a holder is let finish", held().finish(1, "b1").released(8, "a1", ClassReleased).locked(8.1, "b1", int64(s(8.05))).released(9, "b1", ClassReleased), nil, nil},
		{"a holder is notified of a claim that lets it finish", held().finish(1, "b1").notified(1.1, "a1", ClassDisplaced).released(1.4, "a1", ClassDisplaced).
			locked(1.5, "b1", int64(s(1.45))).released(2, "b1", ClassReleased), []string{RuleDisturbed}, nil},
		{"another claim preempts", held().finish(1, "b1").claim(2, "c1").ended(2.1, "b1", ClassDisplaced).notified(2.1, "a1", ClassDisplaced).released(2.4, "a1", ClassDisplaced).
			locked(2.5, "c1", int64(s(2.45))).released(3, "c1", ClassReleased), nil, nil},
		{"another claim preempts, and the holder is not notified", held().finish(1, "b1").claim(2, "c1").ended(2.1, "b1", ClassDisplaced).released(9, "a1", ClassReleased).
			locked(9.1, "c1", int64(s(9.05))).released(10, "c1", ClassReleased), []string{RuleHolder}, nil},
		{"an older claim preempts that reaches the database too late", held().add(1, Attempt, "b1", func(e *Event) { e.How = HowDirect }).add(1, Announcing, "b1", nil).finish(2, "c1").add(3, Announced, "b1", nil).
			ended(3.1, "b1", ClassDisplaced).released(9, "a1", ClassReleased).locked(9.1, "c1", int64(s(9.05))).released(10, "c1", ClassReleased), nil, nil},
		{"a waiter does not leave for a claim that lets finish", held().claim(1, "b1").notified(1.1, "a1", ClassDisplaced).finish(2, "c1").released(3, "a1", ClassReleased).
			locked(3.1, "c1", int64(s(3.05))).ended(8, "b1", ClassDisplaced).released(9, "c1", ClassReleased), []string{RuleWaiter}, nil},
		{"notified of a claim from before the grant", held().claim(0.2, "b1").notified(0.3, "a1", ClassDisplaced).released(0.5, "a1", ClassDisplaced).locked(0.6, "b1", int64(s(0.6))).
			notified(0.7, "b1", ClassDisplaced).released(0.8, "b1", ClassDisplaced), []string{RuleSuperseded}, nil},
		{"contact was broken, and the row is not believed afterwards", held().inject(0.5, 2, "a").claim(1, "b1").released(14, "a1", ClassReleased).
			locked(14.1, "b1", int64(s(14.05))).released(15, "b1", ClassReleased), []string{RuleHolder}, nil},

		{"skipped while it is held", held().skip(1, "b1").ended(1.1, "b1", ClassBusy).released(2, "a1", ClassReleased), nil, nil},
		{"skipped while it is waited for", waited().skip(4.1, "c1").ended(4.2, "c1", ClassBusy).locked(4.3, "b1", int64(s(4.25))).released(5, "b1", ClassReleased), nil, nil},
		{"skipped though it is free", held().released(1, "a1", ClassReleased).skip(3, "b1").ended(3.1, "b1", ClassBusy), []string{RuleSkipped}, nil},
		{"skipped though only a silent claim has waited", (&story{}).skip(3, "b1").ended(3.1, "b1", ClassBusy), []string{RuleSkipped}, nil},
		{"skipped after a process has died with it", held().of(1, Killed, "a", "").skip(9, "b1").ended(9.1, "b1", ClassBusy), nil, nil},
		{"skipped after a waiter has died", (&story{}).claim(0, "a1").of(1, Killed, "a", "").skip(9, "b1").ended(9.1, "b1", ClassBusy), nil, nil},
		{"skipped after a crash that may have forgotten a release", held().released(1, "a1", ClassReleased).of(2, Forget, "", ForgetCrash).skip(3, "b1").ended(3.1, "b1", ClassBusy), nil, nil},
		{"superseded though it only skips", held().skip(1, "b1").claim(1.5, "c1").notified(1.6, "a1", ClassDisplaced).released(1.7, "a1", ClassDisplaced).
			ended(1.8, "b1", ClassDisplaced).locked(1.9, "c1", int64(s(1.9))).released(3, "c1", ClassReleased), []string{RuleSkipped}, nil},
		{"a claim that skips supersedes", (&story{}).claim(0, "a1").skip(1, "b1").locked(1.1, "b1", int64(s(1.1))).ended(1.2, "a1", ClassDisplaced).
			released(2, "b1", ClassReleased), []string{RulePassed, RuleSuperseded}, nil},
		{"takes a key that is waited for", waited().skip(4.1, "c1").locked(4.2, "c1", int64(s(4.2))).released(5, "c1", ClassReleased).
			locked(5.1, "b1", int64(s(5.1))).released(6, "b1", ClassReleased), []string{RulePassed}, nil},
		{"the session of the claim that waits may be dead", waited().inject(2, 6, "b").skip(4.1, "c1").locked(4.2, "c1", int64(s(4.2))).released(7, "c1", ClassReleased).
			locked(7.1, "b1", int64(s(7.1))).released(8, "b1", ClassReleased), nil, nil},
		{"takes a key that is free", held().released(1, "a1", ClassReleased).skip(2, "b1").locked(2.1, "b1", int64(s(2.1))).released(5, "b1", ClassReleased), nil, nil},
	})
}

// TestProgress tests that with n = 2 and 4 s, of three holds in a row one is spared.
func TestProgress(t *testing.T) {
	// row returns n holds, each of which is notified of the next claim a second after it began.
	row := func(n int) *story {
		h := (&story{}).claim(0, "a1")
		for i := 1; i <= n; i++ {
			at, c, next := 2*float64(i), fmt.Sprintf("a%d", i), fmt.Sprintf("a%d", i+1)
			h.locked(at, c, int64(s(at))).claim(at+1, next).notified(at+1.1, c, ClassDisplaced).released(at+1.2, c, ClassDisplaced)
		}
		return h
	}
	last := func(h *story, at float64, c string) *story {
		return h.locked(at, c, int64(s(at))).released(at+0.5, c, ClassReleased)
	}
	spared := row(2).locked(6, "a3", int64(s(6))).claim(7, "a4")
	for _, c := range []struct {
		example
		spared int
	}{
		{example{"two are notified", last(row(2), 6, "a3"), nil, nil}, 0},
		{example{"three are notified", last(row(3), 8, "a4"), []string{RuleStarved}, nil}, 0},
		{example{"four are notified", last(row(4), 10, "a5"), []string{RuleStarved, RuleStarved}, nil}, 0},
		{example{"a grant in between may be unknown", last(row(3).inject(4, 5, "b").claim(4.5, "b1").ended(5.5, "b1", ClassDisplaced), 8, "a4"), nil, nil}, 0},
		{example{"a crash in between", last(row(3).of(5, Forget, "", ForgetCrash), 8, "a4"), nil, nil}, 0},
		{example{"the third is spared and ends", last((&story{}).more(spared).released(9.5, "a3", ClassReleased), 9.6, "a4"), nil, nil}, 1},
		{example{"the third is spared until its time is over", last((&story{}).more(spared).notified(10.1, "a3", ClassDisplaced).released(10.2, "a3", ClassDisplaced), 10.3, "a4"), nil, nil}, 1},
		{example{"the third is never notified", last((&story{}).more(spared).released(16, "a3", ClassReleased), 16.1, "a4"), []string{RuleHolder}, nil}, 1},
		{example{"the second is not notified either", last(row(1).locked(4, "a2", int64(s(4))).claim(5, "a3").released(11, "a2", ClassReleased), 11.1, "a3"), []string{RuleHolder}, nil}, 0},
		{example{"the second was killed before the claim that asked it to stop", last(row(1).locked(4, "a2", int64(s(4))).of(4.5, Killed, "a", "").
			claim(6, "b1").locked(15, "b1", int64(s(15))).claim(15.5, "c1").notified(19.1, "b1", ClassDisplaced).released(19.2, "b1", ClassDisplaced), 19.3, "c1"), nil, nil}, 1},
		{example{"the second was killed, and no claim asked it to stop", last(row(1).locked(4, "a2", int64(s(4))).of(4.5, Killed, "a", "").
			silent(15, "b1").locked(15.1, "b1", int64(s(15.1))).claim(17.5, "c1").released(27, "b1", ClassReleased), 27.1, "c1"), []string{RuleHolder}, nil}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			rules := DefaultRules()
			rules.Progress, rules.Spared = 2, 4*time.Second
			rules.GrantTime = func(token int64) (int64, bool) { return token, true }
			v := Check(*c.history, rules)
			var broken []string
			for _, x := range v.Violations {
				broken = append(broken, x.Rule)
			}
			if fmt.Sprint(broken) != fmt.Sprint(c.want) || v.Spared != c.spared {
				t.Errorf("broken: %q, want %q; %d spared, want %d\n%v", broken, c.want, v.Spared, c.spared, v.Violations)
			}
		})
	}
}

// more adds the events of another story.
func (h *story) more(other *story) *story {
	*h = append(*h, *other...)
	return h
}
