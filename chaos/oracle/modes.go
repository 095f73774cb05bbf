package oracle

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// skipped checks that a claim that skips returns as busy only if another claim may have held the
// key, or waited for it, during the call.
func (j *judge) skipped(claims []*Claim) {
	for _, c := range claims {
		if c.Mode == ModeSkip && c.Locked == 0 && c.EndClass == ClassDisplaced {
			j.violate(Violation{RuleSkipped, c.Ended, c.Key, c.ID, "it was superseded, but it is not compared with other claims"})
		}
		if c.EndClass != ClassBusy || j.forgotten(c.asked()-int64(30*time.Second), c.Ended) {
			continue
		}
		if !slices.ContainsFunc(claims, func(o *Claim) bool { return o != c && j.keepsBusy(o, claims).touches(c.asked(), c.Ended) }) {
			j.violate(Violation{RuleSkipped, c.Ended, c.Key, c.ID, "no claim held the key or waited for it"})
		}
	}
}

// forgotten reports whether the database may have lost anything, such as a release, between two
// times.
func (j *judge) forgotten(from, to int64) bool {
	return slices.ContainsFunc(j.forgets, func(f Event) bool { return f.At >= from && f.At <= to+int64(j.Late) })
}

// keepsBusy returns the span in which the key may have been busy because of the claim.
func (j *judge) keepsBusy(c *Claim, claims []*Claim) span {
	s := span{c.Attempt, first(c.Ended, c.Killed)}
	if s.to == 0 {
		return s
	}
	disturbed := c.Killed != 0 || c.EndClass == ClassLost || touched(j.trouble[place(c.Worker)], c.Attempt, s.to+int64(j.Late))
	switch {
	case disturbed && (c.Locked != 0 || c.Killed != 0):
		// The row may name the claim until another claim is granted the key.
		var next int64
		for _, o := range claims {
			if o != c && o.Locked > s.to {
				next = first(next, o.Locked)
			}
		}
		s.to = next
	// The response with its grant, or the withdrawal of the claim, may have been lost.
	case disturbed:
		for _, t := range j.trouble[place(c.Worker)] {
			if t.touches(c.Attempt, s.to+int64(j.Late)) {
				if t.to == 0 {
					return span{c.Attempt, 0}
				}
				s.to = max(s.to, t.to)
			}
		}
		s.to += tenths(silence, j.timeout(c.Worker)) + int64(j.Late)
	case c.Locked != 0 && (c.EndClass == ClassReleased || c.EndClass == ClassDisplaced):
		// Unlock has returned.
	// The claim is withdrawn a little later.
	default:
		s.to += int64(j.Late)
	}
	return s
}

// passed checks that a claim that skips is granted no key for which the newest claim waits.
func (j *judge) passed(claims []*Claim) {
	for _, c := range claims {
		if c.Mode != ModeSkip || c.Locked == 0 {
			continue
		}
		grant := j.grant(c)
		// The grant was not before the end of earlier holds.
		for _, o := range claims {
			if o.Locked != 0 && o.Locked < c.Locked {
				grant = max(grant, min(o.HoldEnd(), c.Locked))
			}
		}
		for _, w := range claims {
			waits := w != c && w.Announced != 0 && w.Announced < grant-int64(twoClocks) &&
				(w.Locked == 0 || w.Locked > c.Locked) && first(w.Ended, w.Killed, math.MaxInt64) > c.Locked
			if !waits || touched(j.trouble[place(w.Worker)], w.Attempt, c.Locked) || j.forgotten(w.Announcing-int64(j.CrashLoss), c.Locked) {
				continue
			}
			// Another claim may have been the newest, and may have left.
			if slices.ContainsFunc(claims, func(o *Claim) bool {
				return o != c && o != w && o.How != HowSilent && o.Mode != ModeSkip && o.Attempt <= c.Locked && o.lastAnnounced() >= w.Announcing
			}) {
				continue
			}
			j.violate(Violation{RulePassed, c.Locked, c.Key, c.ID,
				fmt.Sprintf("%s had waited for %v, and still waited", w.ID, ms(c.Locked-w.Announced))})
			break
		}
	}
}

// holds returns the claims of a key that have held, in the order of their tokens.
func holds(claims []*Claim) []*Claim {
	held := slices.DeleteFunc(slices.Clone(claims), func(c *Claim) bool { return c.Locked == 0 })
	slices.SortFunc(held, func(a, b *Claim) int { return int(min(1, max(-1, a.Token-b.Token))) })
	return held
}

// unseen reports whether the database may have granted the key, between two times, to a claim that
// does not know of it. That counts as a hold, too.
func (j *judge) unseen(claims []*Claim, from, to int64) bool {
	return slices.ContainsFunc(claims, func(c *Claim) bool {
		end := first(c.Ended, c.Killed, math.MaxInt64)
		if c.Locked != 0 || c.Attempt > to || end < from {
			return false
		}
		return c.EndClass != ClassBusy && c.EndClass != ClassDisplaced || touched(j.trouble[place(c.Worker)], c.Attempt, end)
	})
}

// starved checks that of Progress + 1 holds in a row at least one is not notified because of a
// claim, if it ends within the time for which it is spared.
func (j *judge) starved(claims []*Claim) {
	if j.Progress == 0 {
		return
	}
	var row []*Claim
	for _, h := range holds(claims) {
		if h.NotifiedClass != ClassDisplaced || h.Notified >= h.Locked+int64(j.Spared-j.Late) {
			row = nil
			continue
		}
		row = append(row, h)
		if len(row) <= j.Progress {
			continue
		}
		row = row[len(row)-j.Progress-1:]
		if from := row[0].Locked; j.forgotten(from-int64(j.CrashLoss), h.Locked) || j.unseen(claims, from, h.Locked) {
			continue
		}
		j.violate(Violation{RuleStarved, h.Notified, h.Key, h.ID,
			fmt.Sprintf("the %d holds from %s to this one were all notified of a claim", len(row), row[0].ID)})
	}
}

// mayBeSpared reports whether the holds before this one may all have ended while a claim that
// preempts had asked them to.
func (j *judge) mayBeSpared(h *Claim, claims []*Claim) bool {
	if j.Progress == 0 {
		return false
	}
	held := holds(claims)
	at := slices.Index(held, h)
	for i := at - 1; i >= 0 && at-i <= j.Progress; i-- {
		p := held[i]
		end := first(p.Ended, held[i+1].Locked)
		// The row names the hold of a worker that was killed, or of a lost session, until a
		// successor takes the key over.
		if p.Killed != 0 || p.EndClass == ClassLost {
			end = held[i+1].Locked
		}
		if j.unseen(claims, p.Locked, h.Locked) || j.forgotten(p.Locked-int64(j.CrashLoss), h.Locked) {
			return true
		}
		if !slices.ContainsFunc(claims, func(n *Claim) bool {
			return n != p && n.How != HowSilent && n.Mode == "" && n.Attempt <= end+int64(j.Late) && n.lastAnnounced() >= j.grant(p)-int64(twoClocks)
		}) {
			return false
		}
	}
	return at >= j.Progress
}
