package oracle

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Rules are the bounds that a history is held against.
type Rules struct {
	LockTimeout time.Duration // of the workers
	Preemption  time.Duration // preemption timeout of the workers

	Late      time.Duration // how late a worker may notice what was there to be noticed: scheduling of a busy machine
	Heartbeat time.Duration // C8: a newer claim is known within this time without any message
	Recovery  time.Duration // how long after a fault a session may still be on its way back
	Notify    time.Duration // the workers' bound for Notify and LockKey
	Release   time.Duration // C18
	Delay     time.Duration // C11, the longest lock delay
	CrashLoss time.Duration // how much of the newest unflushed commits a crash of the server may take

	// GrantTime reads from a token when the database granted it, on the
	// history's clock. Without it, or with a false answer, the beginning of the
	// wait is taken, which accuses no claim.
	GrantTime func(token int64) (int64, bool)
}

// DefaultRules are the rules of CONTRACT.md for workers with short timeouts.
func DefaultRules() Rules {
	return Rules{
		LockTimeout: 8 * time.Second,
		Preemption:  3 * time.Second,
		Late:        time.Second,
		Heartbeat:   3 * time.Second,
		Recovery:    12 * time.Second,
		Notify:      15 * time.Second,
		Release:     5 * time.Second,
		Delay:       10 * time.Second,
		CrashLoss:   2 * time.Second,
	}
}

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

// The rules' names.
const (
	RuleExclusion  = "mutual exclusion (C24, C25)"
	RuleTokenOrder = "tokens grow (C15)"
	RuleFence      = "the resource accepted an older token"
	RuleRejected   = "a rejected write that nothing explains"
	RuleNewest     = "an older claim was granted (C3)"
	RuleHolder     = "a holder was not notified of a newer claim (C5, C8)"
	RuleWaiter     = "a waiter did not leave for a newer claim (C4, C8)"
	RuleLost       = "a holder was not notified of its loss in time (C24)"
	RuleRevoked    = "a hold outlived its preemption timeout (C14)"
	RuleHang       = "a claim hangs (C18, C20, C21)"
	RuleFailed     = "a claim failed though nothing was wrong (C26)"
	RuleLeak       = "something is left over (C20, C22)"
)

// Excuse is something that looks like a violation and is one of the documented
// limits.
type Excuse struct {
	Why   string
	Claim string
	At    int64
}

// The excuses' names.
const (
	ExcuseFrozen = "frozen past its lease"
	ExcuseRows   = "state rows deleted by an operator"
	ExcuseAsync  = "asynchronous standby promoted"
	ExcuseCrash  = "claim of the last moment before a server crash"
	ExcuseDrain  = "notified and still cleaning up in Do"
	ExcuseRace   = "notified while it was writing"
)

// Verdict is the result of Check.
type Verdict struct {
	Claims     []*Claim
	Violations []Violation
	Excused    []Excuse
	Detection  []Detection
}

// Detection is how long it took a holder to be notified of a fault, not counting the
// time for which its process was stopped.
type Detection struct {
	Fault string
	At    int64 // of the fault
	Took  time.Duration
}

type judge struct {
	Rules
	events  []Event
	claims  []*Claim
	frozen  map[string][]span // by worker
	trouble map[string][]span // by place: its session may not work
	hit     map[string][]span // by place: any fault; "" is everybody
	forgets []Event
	verdict *Verdict
}

// Check judges a history.
func Check(events []Event, rules Rules) *Verdict {
	events = slices.Clone(events)
	Sort(events)
	j := &judge{Rules: rules, events: events, claims: Claims(events), frozen: map[string][]span{}, trouble: map[string][]span{}, hit: map[string][]span{}}
	j.verdict = &Verdict{Claims: j.claims}
	j.readFaults()
	byKey := map[int64][]*Claim{}
	for _, c := range j.claims {
		byKey[c.Key] = append(byKey[c.Key], c)
	}
	for _, claims := range byKey {
		j.exclusion(claims)
		j.tokens(claims)
		j.newest(claims)
	}
	for _, c := range j.claims {
		j.ends(c)
		j.failed(c)
		j.revocation(c)
	}
	j.rejections()
	j.losses()
	for _, e := range events {
		if e.Kind == Bye && e.Count > 0 {
			j.violate(Violation{RuleLeak, e.At, 0, "", fmt.Sprintf("%s is left with %d goroutines: %s", e.Worker, e.Count, e.Text)})
		}
	}
	slices.SortFunc(j.verdict.Violations, func(a, b Violation) int { return cmp.Compare(a.At, b.At) })
	return j.verdict
}

func (j *judge) violate(v Violation) { j.verdict.Violations = append(j.verdict.Violations, v) }

func (j *judge) excuse(why string, c *Claim, at int64) {
	j.verdict.Excused = append(j.verdict.Excused, Excuse{why, c.ID, at})
}

// readFaults finds out who was disturbed and when.
func (j *judge) readFaults() {
	heal := map[int]int64{}
	for _, e := range j.events {
		if e.Kind == Heal {
			heal[e.ID] = e.At
		}
	}
	for _, e := range j.events {
		switch e.Kind {
		case Frozen:
			j.frozen[e.Worker] = append(j.frozen[e.Worker], span{from: e.At})
		case Thawed:
			if s := j.frozen[e.Worker]; len(s) > 0 {
				s[len(s)-1].to = e.At
			}
		case Killed: // what stopped with the process did not go on
			if s := j.frozen[e.Worker]; len(s) > 0 && s[len(s)-1].to == 0 {
				s[len(s)-1].to = e.At
			}
		case Forget:
			j.forgets = append(j.forgets, e)
		case Inject:
			s := span{from: e.At}
			if to := heal[e.ID]; to != 0 {
				s.to = to + int64(j.Recovery)
			}
			if len(e.Victims) == 0 {
				j.hit[""] = append(j.hit[""], s)
			}
			for _, w := range e.Victims {
				j.hit[place(w)] = append(j.hit[place(w)], s)
				if !e.Session {
					continue
				}
				j.trouble[place(w)] = append(j.trouble[place(w)], s)
			}
		}
	}
	for w, spans := range j.frozen {
		for _, s := range spans {
			if s.to != 0 {
				s.to += int64(j.Recovery)
			}
			j.trouble[place(w)] = append(j.trouble[place(w)], s)
			j.hit[place(w)] = append(j.hit[place(w)], s)
		}
	}
}

// place is where a worker runs: the part of its name before the dot. A fault may
// outlive the process that it hit, and hits the one that follows.
func place(worker string) string {
	name, _, _ := strings.Cut(worker, ".")
	return name
}

func touched(spans []span, from, to int64) bool {
	return slices.ContainsFunc(spans, func(s span) bool { return s.touches(from, to) })
}

// forgot returns the documented reason for which the database may know nothing at
// the time of what it knew at the time from.
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

// exclusion: when a hold begins, every earlier hold of the key is over.
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
		// It could not know while it was stopped, and had to learn soon after.
		if s.touches(earlier.Begin, later.Begin) && (s.to == 0 || end != 0 && end <= s.to+int64(j.Late)) && (s.to == 0 || later.Begin <= s.to+int64(j.Late)) {
			j.excuse(ExcuseFrozen, earlier, later.Begin)
			return
		}
	}
	if why := j.forgot(earlier.Locked, later.Begin); why == ExcuseRows || why == ExcuseAsync {
		j.excuse(why, earlier, later.Begin)
		return
	}
	// Do does not tell that the session died while the function was cleaning up.
	if earlier.How == HowDo && earlier.Notified != 0 && earlier.Notified <= later.Begin &&
		(earlier.NotifiedClass == ClassLost || touched(j.trouble[place(earlier.Worker)], earlier.Begin, later.Begin)) {
		j.excuse(ExcuseDrain, earlier, later.Begin)
		return
	}
	until := "it never ended"
	if end != 0 {
		until = fmt.Sprintf("it ended %v later", ms(end-later.Begin))
	}
	j.violate(Violation{RuleExclusion, later.Begin, later.Key, later.ID,
		fmt.Sprintf("began with token %d while %s (token %d, %s) held: %s", later.Token, earlier.ID, earlier.Token, earlier.How, until)})
}

// tokens: a hold that was asked for after another one began has a larger token.
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

// asked is when the claim began to ask for the key.
func (c *Claim) asked() int64 {
	if c.Waiting != 0 {
		return c.Waiting
	}
	return c.Attempt
}

// newest: an announced claim displaces every older one.
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
		// The first claim that was announced while this one held, or waited.
		for _, newer := range after(announced, older.asked()) {
			if newer == older {
				continue
			}
			if older.Locked != 0 && newer.Announcing > older.Locked {
				j.holder(older, newer)
				break
			}
			if older.Locked == 0 && older.Announced != 0 && older.Waiting != 0 && newer.Announcing > older.Announced {
				j.waiter(older, newer)
				break
			}
		}
	}
}

// after returns the claims that were announced at or after a time.
func after(announced []*Claim, at int64) []*Claim {
	i, _ := slices.BinarySearchFunc(announced, at, func(c *Claim, at int64) int { return cmp.Compare(c.Announced, at) })
	return announced[i:]
}

func (j *judge) granted(older *Claim, announced []*Claim) {
	grant := older.Waiting
	if j.GrantTime != nil {
		if t, ok := j.GrantTime(older.Token); ok && t > older.Waiting && t <= older.Locked+int64(j.Late) {
			grant = t
		}
	}
	for _, newer := range after(announced, older.Announced) {
		if newer.Announced >= grant-int64(20*time.Millisecond) { // two clocks are compared
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

func (j *judge) holder(older, newer *Claim) {
	noticed := first(older.Notified, older.HoldEnd())
	limit := newer.Announced + int64(j.Heartbeat+j.Late)
	if noticed != 0 && noticed <= limit {
		return
	}
	if touched(j.trouble[place(older.Worker)], newer.Announcing, limit) || j.forgot(newer.Announced, limit) != "" {
		return // the rules of C14 and C24 bound it
	}
	j.violate(Violation{RuleHolder, limit, older.Key, older.ID,
		fmt.Sprintf("held undisturbed %v after %s was announced", j.Heartbeat+j.Late, newer.ID)})
}

func (j *judge) waiter(older, newer *Claim) {
	limit := newer.Announced + int64(j.Heartbeat+j.Late)
	if end := first(older.Ended, older.Killed); end != 0 && end <= limit {
		return
	}
	if touched(j.trouble[place(older.Worker)], newer.Announcing, limit) || j.forgot(newer.Announced, limit) != "" {
		return // the lock timeout bounds it
	}
	j.violate(Violation{RuleWaiter, limit, older.Key, older.ID,
		fmt.Sprintf("still waited %v after %s was announced", j.Heartbeat+j.Late, newer.ID)})
}

// ends: every call returns within its bound, not counting the time for which its
// process was stopped.
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
		// LockKey and Notify each wait for a session and a statement, then come the wait, the lock delay, the hold, the release.
		step("Do", c.Attempt, last, 2*j.Notify+j.LockTimeout+j.Delay+MaxHold+j.Preemption+j.Release)
		return
	}
	step("LockKey", c.Attempt, first(c.Announcing, c.Waiting, last), j.Notify)
	step("Notify", c.Announcing, first(c.Announced, last), j.Notify)
	step("Lock", c.Waiting, first(c.Locked, last), j.LockTimeout)
	step("Unlock", c.Releasing, last, j.Release)
	step("the claim", c.Attempt, last, 2*j.Notify+j.LockTimeout+j.Delay+MaxHold+j.Preemption+j.Release)
}

// failed: errors of the database need a fault.
func (j *judge) failed(c *Claim) {
	if c.EndClass != ClassFailed && c.EndClass != ClassContext || touched(j.hit[place(c.Worker)], c.Attempt, c.Ended) || touched(j.hit[""], c.Attempt, c.Ended) {
		return
	}
	j.violate(Violation{RuleFailed, c.Ended, c.Key, c.ID, c.Text})
}

// MaxHold is the longest that a worker holds undisturbed.
const MaxHold = 20 * time.Second

// stopped is for how long a worker could not run between two times.
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

// revocation: a hold that was notified is over when the preemption timeout has
// passed (C14).
func (j *judge) revocation(c *Claim) {
	if c.Notified == 0 || c.How == HowDo { // Do does not show the end of the hold
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

// rejections: a write is only refused to a worker that was stopped, or that has
// just been notified.
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

// losses: a fault that ends sessions is noticed by their holders within its
// bound.
func (j *judge) losses() {
	failed := map[int]bool{}
	for _, e := range j.events {
		if e.Kind == Heal && e.Class == ClassFailed {
			failed[e.ID] = true
		}
	}
	byWorker := map[string][]*Claim{}
	for _, c := range j.claims {
		if c.Locked != 0 {
			byWorker[c.Worker] = append(byWorker[c.Worker], c)
		}
	}
	for _, e := range j.events {
		if e.Kind != Inject || e.Bound == 0 || failed[e.ID] {
			continue
		}
		limit := e.At + e.Bound + int64(j.Late)
		for _, w := range e.Victims {
			for _, c := range byWorker[w] {
				end := c.HoldEnd()
				if c.Locked >= e.At || end != 0 && end <= e.At {
					continue
				}
				if c.NotifiedClass == ClassLost && c.Notified >= e.At {
					j.verdict.Detection = append(j.verdict.Detection, Detection{e.Fault, e.At, time.Duration(c.Notified - e.At - j.stopped(w, e.At, c.Notified))})
				}
				noticed := end // a hold that was notified before for another reason still has to end
				if c.How == HowDo {
					noticed = first(c.Notified, end)
				}
				if noticed != 0 && noticed <= limit || touched(j.frozen[w], e.At, limit) {
					continue
				}
				j.violate(Violation{RuleLost, limit, c.Key, c.ID, fmt.Sprintf("%s: held on %v later", e.Fault, ms(limit-e.At))})
			}
		}
	}
}
