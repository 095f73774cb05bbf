package oracle

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Rules are the bounds that a history is checked against.
type Rules struct {
	LockTimeout time.Duration // of the workers
	Preemption  time.Duration // preemption timeout of the workers
	Session     time.Duration // session timeout of workers that do not report theirs
	Progress    int           // after this number of holds in a row that claims have ended the next one is spared, or 0 to spare none
	Spared      time.Duration // for how long a hold is spared

	Late      time.Duration // how late a worker may notice an event, because of the scheduling of a busy machine
	Reconnect time.Duration // how long after a fault a session may take to reconnect
	Recovery  time.Duration // how long after a fault a worker may be late to notice what it missed
	Notify    time.Duration // the workers' bound for Notify and LockKey
	Release   time.Duration // C18
	CrashLoss time.Duration // how much of the newest unflushed commits a crash of the server may forget

	// GrantTime returns, for a token, when the database granted it, on the history's clock. Without
	// it, or with a false result, the beginning of the wait is used, which leads to no false
	// violation.
	GrantTime func(token int64) (int64, bool)
}

// DefaultRules are the rules of CONTRACT.md for workers with short timeouts.
func DefaultRules() Rules {
	return Rules{
		LockTimeout: 17 * time.Second,
		Preemption:  3 * time.Second,
		Session:     10 * time.Second,
		Late:        time.Second,
		Reconnect:   2 * time.Second,
		Recovery:    5 * time.Second,
		Notify:      15 * time.Second,
		Release:     5 * time.Second,
		CrashLoss:   2 * time.Second,
	}
}

// The parts of a session timeout, in tenths.
const (
	heartbeat = 3  // the interval of heartbeats
	notice    = 9  // from the start of the last good heartbeat to ErrLockLost
	survived  = 6  // of an outage that begins just before a heartbeat: notice − heartbeat
	silence   = 15 // until the server ends a silent connection
)

func tenths(n int, timeout time.Duration) int64 { return int64(timeout) / 10 * int64(n) }

// Violation is a promise that was broken.
type Violation struct {
	Rule  string
	At    int64
	Key   int64
	Claim string
	Text  string
}

func (v Violation) String() string {
	return fmt.Sprintf("%s: key %d, claim %s: %s", v.Rule, v.Key, v.Claim, v.Text)
}

// The names of the rules.
const (
	RuleExclusion  = "mutual exclusion (C24, C25)"
	RuleTokenOrder = "tokens grow (C15)"
	RuleFence      = "the resource accepted an older token"
	RuleRejected   = "a rejected write that nothing explains"
	RuleNewest     = "an older claim was granted (C3)"
	RuleSuperseded = "a claim was superseded by none (C4, C26)"
	RuleHolder     = "a holder was not notified of a newer claim (C5, C8)"
	RuleDisturbed  = "a holder was notified though no claim preempts"
	RuleStarved    = "claims have ended too many holds in a row"
	RuleSkipped    = "a claim was skipped though the key was free"
	RulePassed     = "a claim that skips took a key that was waited for"
	RuleWaiter     = "a waiter did not leave for a newer claim (C4, C8)"
	RuleKept       = "a hold was lost that could have been kept (C24)"
	RuleLost       = "a holder was not notified of its loss in time (C24)"
	RuleEarly      = "a key was taken from a dead session too early (C11)"
	RuleStuck      = "a key that is free cannot be had (C11, C20)"
	RuleRevoked    = "a hold outlived its preemption timeout (C14)"
	RuleHang       = "a claim hangs (C18, C20, C21)"
	RuleFailed     = "a claim did not wait for what passes (C26)"
	RuleLeak       = "something is left over (C20, C22)"
)

// Excuse is an observation that looks like a violation but is one of the documented limits.
type Excuse struct {
	Why   string
	Claim string
	At    int64
}

// The names of the excuses.
const (
	ExcuseFrozen = "frozen past its session timeout"
	ExcuseRows   = "state rows deleted by an operator"
	ExcuseAsync  = "asynchronous standby promoted"
	ExcuseCrash  = "claim of the last moment before a server crash"
	ExcuseRace   = "notified while it was writing"
)

// Verdict is the result of Check.
type Verdict struct {
	Claims     []*Claim
	Violations []Violation
	Excused    []Excuse
	Detection  []Detection
	Survival   []Survival
	Absences   []time.Duration // from suspended to reconnected
	Suspended  int             // number of sessions, according to their providers
	Spared     int             // number of holds that were not notified of a claim as soon as others are
}

// FaultFrozen is the fault of a Detection after SIGSTOP.
const FaultFrozen = "frozen"

// Detection is how long it took until a holder was notified of its loss, not counting the time for
// which its process was stopped.
type Detection struct {
	Fault string
	At    int64 // of the fault
	Took  time.Duration
}

// Survival contains how many of the victims' holds still existed when a fault had ended, and how
// many were lost because of it.
type Survival struct {
	Fault      string
	At         int64 // of the fault
	Kept, Lost int
}

type judge struct {
	Rules
	events   []Event
	claims   []*Claim
	timeouts map[string]time.Duration // of sessions, by worker
	heals    map[int]int64            // by fault
	frozen   map[string][]span        // by worker
	outages  map[string][]outage      // by place, including the time to reconnect
	trouble  map[string][]span        // by place: spans in which it may miss events
	forgets  []Event
	verdict  *Verdict
}

// Check judges a history.
func Check(events []Event, rules Rules) *Verdict {
	events = slices.Clone(events)
	Sort(events)
	j := &judge{Rules: rules, events: events, claims: Claims(events), timeouts: map[string]time.Duration{}, heals: map[int]int64{},
		frozen: map[string][]span{}, outages: map[string][]outage{}, trouble: map[string][]span{}}
	j.verdict = &Verdict{Claims: j.claims}
	j.readFaults()
	byKey := map[int64][]*Claim{}
	byWorker := map[string][]*Claim{}
	for _, c := range j.claims {
		byKey[c.Key] = append(byKey[c.Key], c)
		byWorker[c.Worker] = append(byWorker[c.Worker], c)
	}
	for _, claims := range byKey {
		j.exclusion(claims)
		j.tokens(claims)
		j.newest(claims)
		j.superseded(claims)
		j.skipped(claims)
		j.passed(claims)
		j.starved(claims)
		j.successors(claims)
		j.stuck(claims)
	}
	for _, claims := range byWorker {
		j.failed(claims)
	}
	for _, c := range j.claims {
		j.ends(c)
		j.kept(c)
		j.revocation(c)
	}
	j.rejections()
	j.losses(byWorker)
	j.survival(byWorker)
	j.absences()
	for _, e := range events {
		if e.Kind == Bye && e.Count > 0 {
			j.violate(Violation{RuleLeak, e.At, 0, "", fmt.Sprintf("%s is left with %d goroutines: %s", e.Worker, e.Count, e.Text)})
		}
	}
	slices.SortFunc(j.verdict.Violations, func(a, b Violation) int {
		return cmp.Or(cmp.Compare(a.At, b.At), cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Claim, b.Claim))
	})
	return j.verdict
}

func (j *judge) violate(v Violation) { j.verdict.Violations = append(j.verdict.Violations, v) }

func (j *judge) excuse(why string, c *Claim, at int64) {
	j.verdict.Excused = append(j.verdict.Excused, Excuse{why, c.ID, at})
}

// timeout returns the session timeout of a worker.
func (j *judge) timeout(worker string) time.Duration { return cmp.Or(j.timeouts[worker], j.Session) }

// readFaults records which workers were affected by faults, and when.
func (j *judge) readFaults() {
	for _, e := range j.events {
		if e.Kind == Heal {
			j.heals[e.ID] = e.At
		}
	}
	away := map[string][]outage{}
	for _, e := range j.events {
		switch e.Kind {
		case Hello:
			j.timeouts[e.Worker] = time.Duration(e.Timeout)
		case Frozen:
			j.frozen[e.Worker] = append(j.frozen[e.Worker], span{from: e.At})
		case Thawed:
			if s := j.frozen[e.Worker]; len(s) > 0 {
				s[len(s)-1].to = e.At
			}
		// The process ended while it was stopped.
		case Killed:
			if s := j.frozen[e.Worker]; len(s) > 0 && s[len(s)-1].to == 0 {
				s[len(s)-1].to = e.At
			}
		case Forget:
			j.forgets = append(j.forgets, e)
		case Inject:
			s := span{e.At, j.heals[e.ID]}
			for _, w := range e.Victims {
				if e.Session || e.Cut || e.Slow {
					j.trouble[place(w)] = append(j.trouble[place(w)], s.longer(j.Recovery))
					away[place(w)] = append(away[place(w)], outage{span: s, broken: e.Session || e.Cut})
				}
			}
		}
	}
	for w, spans := range j.frozen {
		for _, s := range spans {
			j.trouble[place(w)] = append(j.trouble[place(w)], s.longer(j.Recovery))
			away[place(w)] = append(away[place(w)], outage{span: s, broken: true})
		}
	}
	for p, all := range away {
		j.outages[p] = j.merge(all)
	}
}

// outage is a span in which a session may be out of contact.
type outage struct {
	span
	broken bool  // whether contact may have been broken, not only slow to come back
	since  int64 // when it may first have been broken
}

// merge joins faults that leave no time to reconnect between them.
func (j *judge) merge(all []outage) []outage {
	slices.SortFunc(all, func(a, b outage) int { return cmp.Compare(a.from, b.from) })
	var merged []outage
	for _, o := range all {
		o.span = o.longer(j.Reconnect + j.Late)
		if o.broken {
			o.since = o.from
		}
		if n := len(merged); n > 0 && merged[n-1].touches(o.from, o.from) {
			last := &merged[n-1]
			if last.to != 0 {
				last.to = max(last.to, o.to)
			}
			if o.to == 0 {
				last.to = 0
			}
			last.since = first(last.since, o.since)
			continue
		}
		merged = append(merged, o)
	}
	return merged
}

// place returns the place of a worker: the part of its name before the dot. A fault may outlive the
// process that it hit, and then affects the next one in its place.
func place(worker string) string {
	name, _, _ := strings.Cut(worker, ".")
	return name
}

func touched(spans []span, from, to int64) bool {
	return slices.ContainsFunc(spans, func(s span) bool { return s.touches(from, to) })
}

// forgot returns the documented reason for which the database, at the time to, may have forgotten
// what it knew at the time from, or "" if there is none.
func (j *judge) forgot(from, to int64) string {
	for _, f := range j.forgets {
		switch {
		case f.Class == ForgetRows && f.At >= from && f.At <= to:
			return ExcuseRows
		case f.Class == ForgetAsync && f.At >= from && f.At <= to:
			return ExcuseAsync
		case f.Class == ForgetCrash && f.At+int64(j.Late) >= from && f.At-int64(j.CrashLoss) <= from && f.At <= to:
			return ExcuseCrash
		}
	}
	return ""
}

// exclusion checks that when a hold begins, every earlier hold of the key has ended.
func (j *judge) exclusion(claims []*Claim) {
	var holds []*Claim
	for _, c := range claims {
		if c.Begin != 0 {
			holds = append(holds, c)
		}
	}
	slices.SortFunc(holds, func(a, b *Claim) int { return cmp.Compare(a.Begin, b.Begin) })
	for i, later := range holds {
		for _, earlier := range holds[:i] {
			end := earlier.HoldEnd()
			if end != 0 && end <= later.Begin {
				continue
			}
			// The channel is read by another goroutine than the one that closed it.
			if end != 0 && end == earlier.Over && end <= later.Begin+int64(j.Late) {
				continue
			}
			j.overlap(earlier, later, end)
		}
	}
}

func (j *judge) overlap(earlier, later *Claim, end int64) {
	for _, s := range j.frozen[earlier.Worker] {
		// The worker could not know of the loss while it was stopped, and had to notice it soon
		// after. The keys of a worker that is stopped for a short time must not be taken over.
		if s.touches(earlier.Begin, later.Begin) && later.Begin >= s.from+tenths(survived, j.timeout(earlier.Worker))-int64(j.Late) && (s.to == 0 || end != 0 && end <= s.to+int64(j.Late)) && (s.to == 0 || later.Begin <= s.to+int64(j.Late)) {
			j.excuse(ExcuseFrozen, earlier, later.Begin)
			return
		}
	}
	// A row that was deleted is no excuse, because its holder is notified before a successor may
	// follow.
	if why := j.forgot(earlier.Locked, later.Begin); why == ExcuseAsync {
		j.excuse(why, earlier, later.Begin)
		return
	}
	until := "it never ended"
	if end != 0 {
		until = fmt.Sprintf("it ended %v later", ms(end-later.Begin))
	}
	j.violate(Violation{RuleExclusion, later.Begin, later.Key, later.ID,
		fmt.Sprintf("began with token %d while %s (token %d, %s) held: %s", later.Token, earlier.ID, earlier.Token, earlier.How, until)})
}

// tokens checks that a hold that was asked for after another one began has a larger token.
func (j *judge) tokens(claims []*Claim) {
	var holds []*Claim
	for _, c := range claims {
		if c.Locked != 0 {
			holds = append(holds, c)
		}
	}
	slices.SortFunc(holds, func(a, b *Claim) int { return cmp.Compare(a.Locked, b.Locked) })
	seen := map[int64]*Claim{}
	var largest *Claim
	next := 0 // holds[:next] began before the current one was asked for
	byAsked := slices.Clone(holds)
	slices.SortFunc(byAsked, func(a, b *Claim) int { return cmp.Compare(a.asked(), b.asked()) })
	for _, c := range byAsked {
		for next < len(holds) && holds[next].Locked < c.asked() {
			if largest == nil || holds[next].Token > largest.Token {
				largest = holds[next]
			}
			next++
		}
		if largest != nil && c.Token <= largest.Token {
			j.violate(Violation{RuleTokenOrder, c.Locked, c.Key, c.ID,
				fmt.Sprintf("token %d after %s had %d", c.Token, largest.ID, largest.Token)})
		}
		if twin := seen[c.Token]; twin != nil {
			j.violate(Violation{RuleTokenOrder, c.Locked, c.Key, c.ID, fmt.Sprintf("token %d is also that of %s", c.Token, twin.ID)})
		}
		seen[c.Token] = c
	}
}

// asked returns when the claim began to ask for the key.
func (c *Claim) asked() int64 {
	if c.Waiting != 0 {
		return c.Waiting
	}
	return c.Attempt
}

// newest checks that an announced claim supersedes every older one.
func (j *judge) newest(claims []*Claim) {
	var announced []*Claim
	for _, c := range claims {
		if c.Announced != 0 {
			announced = append(announced, c)
		}
	}
	slices.SortFunc(announced, func(a, b *Claim) int { return cmp.Compare(a.Announced, b.Announced) })
	for _, older := range claims {
		if older.Locked != 0 && older.Announced != 0 {
			j.granted(older, announced)
		}
		// This finds the first claim that was announced while this one held or waited.
		for _, newer := range after(announced, older.asked()) {
			if newer == older {
				continue
			}
			if older.Locked != 0 && newer.Announcing > older.Locked {
				if newer.Mode == ModeFinish || overtaken(newer, announced) {
					continue
				}
				j.holder(older, newer, claims)
				break
			}
			if older.Locked == 0 && older.Announced != 0 && older.Waiting != 0 && newer.Announcing > older.Announced {
				j.waiter(older, newer)
				break
			}
		}
	}
}

// overtaken reports whether a newer claim that lets the holder finish may have reached the database
// before this one. Then this one was never the newest, and the other decides.
func overtaken(c *Claim, announced []*Claim) bool {
	return slices.ContainsFunc(after(announced, c.Announcing), func(n *Claim) bool {
		return n.Mode == ModeFinish && n.Announcing > c.Announcing && n.Announced <= c.Announced
	})
}

// after returns the claims that were announced at or after a time.
func after(announced []*Claim, at int64) []*Claim {
	i, _ := slices.BinarySearchFunc(announced, at, func(c *Claim, at int64) int { return cmp.Compare(c.Announced, at) })
	return announced[i:]
}

// twoClocks bounds the difference between the database's clock and the history's.
const twoClocks = 20 * time.Millisecond

// grant returns when the database granted the hold, or the beginning of its wait.
func (j *judge) grant(c *Claim) int64 {
	if j.GrantTime != nil {
		if t, ok := j.GrantTime(c.Token); ok && t > c.asked() && t <= c.Locked+int64(j.Late) {
			return t
		}
	}
	return c.asked()
}

func (j *judge) granted(older *Claim, announced []*Claim) {
	grant := j.grant(older)
	for _, newer := range after(announced, older.Announced) {
		if newer.Announced >= grant-int64(twoClocks) {
			break
		}
		if newer == older || newer.Announcing <= older.Announced {
			continue
		}
		if why := j.forgot(newer.Announced, grant); why != "" {
			j.excuse(why, older, grant)
			return
		}
		j.violate(Violation{RuleNewest, older.Locked, older.Key, older.ID,
			fmt.Sprintf("was granted %v after %s was announced, which is newer", ms(grant-newer.Announced), newer.ID)})
		return
	}
}

func (j *judge) holder(older, newer *Claim, claims []*Claim) {
	noticed := first(older.Notified, older.HoldEnd())
	late := tenths(heartbeat, j.timeout(older.Worker)) + int64(j.Late)
	limit := newer.Announced + late
	if noticed != 0 && noticed <= newer.Announced+int64(j.Late) {
		return
	}
	if j.mayBeSpared(older, claims) {
		j.verdict.Spared++
		limit = max(limit, older.Locked+int64(j.Spared)+late)
	}
	if noticed != 0 && noticed <= limit {
		return
	}
	// What a holder has missed, it finds in the row when the trouble has ended.
	for moved := true; moved; {
		moved = false
		for _, t := range j.trouble[place(older.Worker)] {
			if t.touches(newer.Announcing, limit) && (t.to == 0 || t.to+late > limit) {
				if t.to == 0 {
					// The rules of C14 and C24 bound this case.
					return
				}
				limit, moved = t.to+late, true
			}
		}
	}
	if noticed != 0 && noticed <= limit || j.forgot(newer.Announced, limit) != "" {
		return
	}
	j.violate(Violation{RuleHolder, limit, older.Key, older.ID,
		fmt.Sprintf("held undisturbed %v after %s was announced", ms(limit-newer.Announced), newer.ID)})
}

func (j *judge) waiter(older, newer *Claim) {
	limit := newer.Announced + tenths(heartbeat, j.timeout(older.Worker)) + int64(j.Late)
	if end := first(older.Ended, older.Killed); end != 0 && end <= limit {
		return
	}
	if touched(j.trouble[place(older.Worker)], newer.Announcing, limit) || j.forgot(newer.Announced, limit) != "" {
		// The lock timeout bounds this case.
		return
	}
	j.violate(Violation{RuleWaiter, limit, older.Key, older.ID,
		fmt.Sprintf("still waited %v after %s was announced", ms(limit-newer.Announced), newer.ID)})
}

// superseded checks that a claim is superseded only if there is a newer one.
func (j *judge) superseded(claims []*Claim) {
	for _, c := range claims {
		at := c.Ended
		if c.NotifiedClass == ClassDisplaced {
			at = c.Notified
		} else if c.EndClass != ClassDisplaced {
			continue
		}
		from, rule, text := max(c.Attempt, c.Announcing), RuleSuperseded, "there is no newer claim"
		held := c.NotifiedClass == ClassDisplaced
		if held {
			from = j.grant(c) - int64(twoClocks)
		}
		announced := func(n *Claim) bool {
			return n != c && n.How != HowSilent && n.Mode != ModeSkip && n.Attempt <= at && n.lastAnnounced() >= from
		}
		if held && slices.ContainsFunc(claims, announced) {
			rule, text = RuleDisturbed, "every newer claim lets it finish"
		}
		if !slices.ContainsFunc(claims, func(n *Claim) bool { return announced(n) && !(held && n.Mode == ModeFinish) }) {
			// A row that was deleted is created again without its newest claim, which may still
			// wait. A claim that came after the deletion then finds that one to be newer.
			// So does one that is not announced, after an asynchronous standby had forgotten that one.
			excuse := j.forgot(c.Attempt-int64(j.LockTimeout), at)
			if excuse == ExcuseRows || excuse == ExcuseAsync && c.How == HowSilent {
				j.excuse(excuse, c, at)
				continue
			}
			j.violate(Violation{rule, at, c.Key, c.ID, text})
		}
	}
}

// lastAnnounced returns the last moment at which the claim may have reached the database.
func (c *Claim) lastAnnounced() int64 {
	switch {
	case c.Announced != 0 || c.Locked != 0:
		return cmp.Or(c.Announced, c.Locked)
	case c.EndClass == ClassDisplaced:
		return c.Ended
	}
	// An announcement that was not confirmed may still be in flight.
	return math.MaxInt64
}

// successors checks that the keys of a process that dies are taken over only by processes that have
// watched its session being dead for its timeout.
func (j *judge) successors(claims []*Claim) {
	for _, dead := range claims {
		if dead.Killed == 0 || dead.Locked == 0 || dead.HoldEnd() != dead.Killed ||
			dead.Notified != 0 && dead.Killed >= dead.Notified+int64(j.Preemption-j.Late) || // it may have been revoked
			touched(j.trouble[place(dead.Worker)], dead.Locked, dead.Killed) { // its session may have been dead before
			continue
		}
		var next *Claim
		for _, c := range claims {
			if c.Locked > dead.Killed && (next == nil || c.Locked < next.Locked) {
				next = c
			}
		}
		timeout := j.timeout(dead.Worker)
		if next == nil || next.Locked >= dead.Killed+int64(timeout-j.Late) || j.forgot(dead.Locked, next.Locked) == ExcuseAsync {
			continue
		}
		j.violate(Violation{RuleEarly, next.Locked, next.Key, next.ID,
			fmt.Sprintf("got the key %v after the process of %s was killed, whose session timeout is %v", ms(next.Locked-dead.Killed), dead.ID, timeout)})
	}
}

// stuck checks that a waiter for a key without a hold acquires it, at the latest when its process
// has watched a dead session for its timeout. It need not be the same claim that waits all the
// time.
func (j *judge) stuck(claims []*Claim) {
	longest := j.Session
	for _, t := range j.timeouts {
		longest = max(longest, t)
	}
	// Waiters look at the key every second.
	patience := int64(time.Second + 2*j.Late)
	for _, free := range j.free(claims) {
		if slices.ContainsFunc(j.forgets, func(f Event) bool { return f.At >= free.from-int64(longest) && f.At <= free.to }) {
			continue
		}
		var waits []*Claim
		watching := map[string]int64{} // since when, by worker
		for _, c := range claims {     // sorted by their beginning
			out := first(c.Locked, c.Ended, c.Killed, free.to)
			if c.Mode == ModeSkip || c.asked() >= free.to || out <= free.from || touched(j.trouble[place(c.Worker)], c.asked(), out) {
				continue
			}
			waits = append(waits, c)
			since := max(c.asked(), free.from)
			watching[c.Worker] = min(cmp.Or(watching[c.Worker], since), since)
		}
		var waited, until int64 // by processes that have watched for long enough
		for _, c := range waits {
			from := max(c.asked(), free.from, watching[c.Worker]+int64(longest), until)
			out := min(first(c.Locked, c.Ended, c.Killed, free.to), free.to)
			if out <= from {
				continue
			}
			if waited, until = waited+out-from, out; waited > patience {
				j.violate(Violation{RuleStuck, out, c.Key, c.ID, fmt.Sprintf("there has been no hold for %v", ms(out-free.from))})
				break
			}
		}
	}
}

// free returns the spans in which no claim can have held the key, as far as the database knows.
func (j *judge) free(claims []*Claim) []span {
	var busy []span
	for _, c := range claims {
		if s, ok := j.mayHold(c); ok {
			busy = append(busy, s)
		}
	}
	slices.SortFunc(busy, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	var free []span
	end := j.events[0].At
	for _, s := range busy {
		if s.from > end {
			free = append(free, span{end, s.from})
		}
		if s.to == 0 {
			return free
		}
		end = max(end, s.to)
	}
	return append(free, span{end, j.events[len(j.events)-1].At})
}

// mayHold returns the span in which the claim may have held the key, as far as the database knows.
func (j *judge) mayHold(c *Claim) (span, bool) {
	s := span{c.Locked, first(c.Ended, c.Killed)}
	disturbed := c.EndClass == ClassLost
	for _, t := range j.trouble[place(c.Worker)] {
		if !t.touches(c.Attempt, cmp.Or(s.to, math.MaxInt64)) {
			continue
		}
		disturbed = true
		if s.to == 0 || t.to == 0 {
			s.to = 0
			break
		}
		s.to = max(s.to, t.to)
	}
	// In that case the server has to end its connection.
	if disturbed && s.to != 0 {
		s.to += tenths(silence, j.timeout(c.Worker))
	}
	// The response with its grant may have been lost.
	if c.Locked == 0 {
		s.from = c.asked()
	}
	return s, c.Locked != 0 || c.Killed != 0 || disturbed
}

// ends checks that every call returns within its bound, not counting the time for which its process
// was stopped.
func (j *judge) ends(c *Claim) {
	last := c.Killed
	if last == 0 {
		last = c.Ended
	}
	step := func(what string, from, to int64, bound time.Duration) {
		if from == 0 {
			return
		}
		if to == 0 || c.Killed != 0 && to > c.Killed {
			if c.Killed != 0 {
				to = c.Killed
			} else {
				j.violate(Violation{RuleHang, from, c.Key, c.ID, what + " never returned"})
				return
			}
		}
		took := to - from - j.stopped(c.Worker, from, to)
		if limit := int64(bound + 2*j.Late); took > limit {
			j.violate(Violation{RuleHang, to, c.Key, c.ID, fmt.Sprintf("%s took %v (%s %s)", what, ms(took), c.EndClass, c.Text)})
		}
	}
	if c.How == HowDo {
		// LockKey and Notify each wait for a session and a statement. Then the wait, the hold and
		// the release follow.
		step("Do", c.Attempt, last, 2*j.Notify+j.LockTimeout+MaxHold+j.Preemption+j.Release)
		return
	}
	step("LockKey", c.Attempt, first(c.Announcing, c.Waiting, last), j.Notify)
	step("Notify", c.Announcing, first(c.Announced, last), j.Notify)
	step("Lock", c.Waiting, first(c.Locked, last), j.LockTimeout)
	step("Unlock", c.Releasing, last, j.Release)
	step("the claim", c.Attempt, last, 2*j.Notify+j.LockTimeout+MaxHold+j.Preemption+j.Release)
}

// failed checks that a claim of a provider that has worked waits for the end of a temporary fault.
// Only its own bound, the lock timeout or its context, may end it.
func (j *judge) failed(claims []*Claim) {
	var worked int64 // when the worker first completed a call
	for _, c := range claims {
		worked = first(worked, c.Announcing, c.Waiting, c.Locked)
	}
	for _, c := range claims {
		if !slices.Contains([]string{ClassFailed, ClassContext, ClassTimeout, ClassMax, ClassLost}, c.EndClass) {
			continue
		}
		from, bound := max(c.Attempt, c.Announcing, c.Waiting), min(j.LockTimeout, j.Notify)
		switch {
		case c.Locked != 0 && (c.Releasing == 0 || c.EndClass == ClassLost || c.EndClass == ClassMax):
			// Its hold was ended by the provider.
			continue
		case c.Locked != 0:
			from, bound = c.Releasing, j.Release
		case c.Waiting != 0 || c.How == HowDo:
			bound = j.LockTimeout
		}
		if worked == 0 || worked > from || c.Ended-from >= int64(bound-100*time.Millisecond) {
			continue
		}
		j.violate(Violation{RuleFailed, c.Ended, c.Key, c.ID, fmt.Sprintf("%s after %v: %s", c.EndClass, ms(c.Ended-from), c.Text)})
	}
}

// MaxHold is the longest hold of a worker that is not notified.
const MaxHold = 20 * time.Second

// stopped returns for how long a worker was stopped between two times.
func (j *judge) stopped(worker string, from, to int64) int64 {
	var sum int64
	for _, s := range j.frozen[worker] {
		end := to
		if s.to != 0 {
			end = min(end, s.to)
		}
		if start := max(from, s.from); start < end {
			sum += end - start
		}
	}
	return sum
}

// revocation checks that a hold that was notified has ended when the preemption timeout has passed
// (C14).
func (j *judge) revocation(c *Claim) {
	// Do does not show the end of the hold.
	if c.Notified == 0 || c.How == HowDo {
		return
	}
	end := c.HoldEnd()
	if end == 0 {
		end = c.Notified + int64(time.Hour)
	}
	if took := end - c.Notified - j.stopped(c.Worker, c.Notified, end); took > int64(j.Preemption+j.Late) {
		j.violate(Violation{RuleRevoked, end, c.Key, c.ID, fmt.Sprintf("notified %v before the end", ms(took))})
	}
}

// rejections checks that a write is rejected only for a worker that was stopped, or that has just
// been notified.
func (j *judge) rejections() {
	byID := map[string]*Claim{}
	for _, c := range j.claims {
		byID[c.ID] = c
	}
	for _, e := range j.events {
		if e.Kind != Write || e.OK || !e.Belief {
			continue
		}
		c := byID[e.Claim]
		switch {
		case touched(j.frozen[c.Worker], c.Locked, e.At):
			j.excuse(ExcuseFrozen, c, e.At)
		case j.forgot(c.Locked, e.At) == ExcuseRows, j.forgot(c.Locked, e.At) == ExcuseAsync:
			j.excuse(j.forgot(c.Locked, e.At), c, e.At)
		case c.Notified != 0 && c.Notified <= e.At+int64(j.Late):
			j.excuse(ExcuseRace, c, e.At)
		default:
			j.violate(Violation{RuleRejected, e.At, c.Key, c.ID, fmt.Sprintf("token %d was refused though the holder was not notified", e.Token)})
		}
	}
}

// LostAt returns when the claim's hold was lost, as far as its worker could know, or 0 if it was
// not.
func (c *Claim) LostAt() int64 {
	switch {
	case c.NotifiedClass == ClassLost:
		return c.Notified
	case c.Notified == 0 && c.Locked != 0 && c.EndClass == ClassLost:
		return c.Ended
	}
	return 0
}

// kept checks that a hold is lost only if its process may have been out of contact for so long that
// 0.9 of the session timeout had passed since its last heartbeat.
func (j *judge) kept(c *Claim) {
	at := c.LostAt()
	if at == 0 {
		return
	}
	if why := j.forgot(c.Locked, at); why == ExcuseRows || why == ExcuseAsync {
		// The row did not name the hold any longer.
		return
	}
	least := tenths(survived, j.timeout(c.Worker)) - int64(j.Late)
	var longest int64
	for _, o := range j.outages[place(c.Worker)] {
		if o.since != 0 && o.touches(at, at) {
			if longest = max(longest, at-o.since); longest >= least {
				return
			}
		}
	}
	text := "no fault kept its session out of contact"
	if longest > 0 {
		text = fmt.Sprintf("its session can have been out of contact for %v only", ms(longest))
	}
	j.violate(Violation{RuleKept, at, c.Key, c.ID, text + ": " + c.Text})
}

// losses checks that a worker that is out of contact for too long notices it when 0.9 of the
// session timeout has passed.
func (j *judge) losses(byWorker map[string][]*Claim) {
	failed := map[int]bool{}
	for _, e := range j.events {
		if e.Kind == Heal && e.Class == ClassFailed {
			failed[e.ID] = true
		}
	}
	for _, e := range j.events {
		if e.Kind != Inject || !e.Cut || failed[e.ID] {
			continue
		}
		for _, w := range e.Victims {
			due := e.At + tenths(notice, j.timeout(w))
			if heal := j.heals[e.ID]; heal != 0 && heal < due || touched(j.frozen[w], e.At, due+int64(j.Late)) {
				continue
			}
			j.noticed(byWorker[w], e.Fault, e.At, e.At, due)
		}
	}
	for w, spans := range j.frozen {
		for _, s := range spans {
			if s.to != 0 && s.to-s.from >= tenths(notice, j.timeout(w))+int64(j.Late) {
				j.noticed(byWorker[w], FaultFrozen, s.from, s.to, s.to)
			}
		}
	}
}

// noticed checks that the claims that held from one time until contact was known to be lost have
// noticed the loss when it was due.
func (j *judge) noticed(claims []*Claim, fault string, from, at, due int64) {
	limit := due + int64(j.Late)
	for _, c := range claims {
		end := c.HoldEnd()
		if c.Locked == 0 || c.Locked >= from || end != 0 && end <= at {
			continue
		}
		if c.NotifiedClass == ClassLost && c.Notified >= at {
			j.verdict.Detection = append(j.verdict.Detection, Detection{fault, at, time.Duration(c.Notified - at)})
		}
		noticed := end // a hold that was notified before for another reason still has to end
		if c.How == HowDo {
			noticed = first(c.Notified, end)
		}
		if noticed == 0 || noticed > limit {
			j.violate(Violation{RuleLost, limit, c.Key, c.ID, fmt.Sprintf("%s: held on %v later", fault, ms(limit-at))})
		}
	}
}

// survival counts the victims' holds that were kept and lost.
func (j *judge) survival(byWorker map[string][]*Claim) {
	for _, e := range j.events {
		if e.Kind != Inject {
			continue
		}
		s := Survival{Fault: e.Fault, At: e.At}
		over := max(e.At, j.heals[e.ID])
		for _, w := range e.Victims {
			for _, c := range byWorker[w] {
				end := c.HoldEnd()
				if c.Locked == 0 || c.Locked >= e.At || end != 0 && end <= e.At || c.Notified != 0 && c.Notified <= e.At {
					continue
				}
				if lost := c.LostAt(); lost != 0 && lost <= over+int64(j.Reconnect+j.Late) {
					s.Lost++
				} else if end == 0 || end > over {
					s.Kept++
				}
			}
		}
		j.verdict.Survival = append(j.verdict.Survival, s)
	}
}

// absences measures for how long sessions were suspended.
func (j *judge) absences() {
	since := map[string]int64{}
	for _, e := range j.events {
		switch {
		case e.Kind == Suspended:
			j.verdict.Suspended++
			since[e.Worker] = e.At
		case e.Kind == Reconnected && since[e.Worker] != 0:
			j.verdict.Absences = append(j.verdict.Absences, time.Duration(e.At-since[e.Worker]))
			delete(since, e.Worker)
		}
	}
}
