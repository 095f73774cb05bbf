package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/preemptable/locker/chaos/oracle"
)

// line is a line of the table.
type line struct {
	name                                   string
	runs, claims, holds                    int
	displaced, timedOut, lost, kept        int
	letFinish, skipped                     int
	failed, killed, hung                   int
	writes, rejected, overlaps, violations int
	detection                              []time.Duration
}

// report is the result of one or more runs.
type report struct {
	seeds      []string
	took       time.Duration
	lines      []*line
	excused    map[string]int
	violations int
	rules      map[string]int // violations of each rule
	left       []string
	spared     int             // holds
	suspended  int             // sessions
	absences   []time.Duration // from suspended to reconnected
	resumed    []time.Duration // from SIGCONT to the notification of a loss
}

// judge checks the history of a run against the rules, and reports each violation with say.
func (d *recording) judge(say func(format string, args ...any)) report {
	rules := oracle.DefaultRules()
	if d.Late != 0 {
		rules.Late = d.Late
	}
	if d.Session != 0 {
		rules.Session, rules.LockTimeout = d.Session, lockTimeout(d.Session)
	}
	rules.Progress, rules.Spared = d.Progress, d.Spared
	// Tokens are microseconds of the server's clock.
	if !d.Broken {
		rules.GrantTime = func(token int64) (int64, bool) { return token*1000 - d.Offset, true }
	}
	v := oracle.Check(d.Events, rules)
	v.Violations = append(v.Violations, oracle.CheckRows(d.Rows)...)
	if !oracle.CheckResource(d.Events, d.Rows, 20*time.Second) {
		v.Violations = append(v.Violations, oracle.Violation{Rule: "the fenced resource itself does not compare tokens"})
	}
	r := report{seeds: []string{fmt.Sprint(d.Seed)}, took: d.Took, excused: map[string]int{}, rules: map[string]int{}, violations: len(v.Violations), left: d.Left, spared: v.Spared, suspended: v.Suspended, absences: v.Absences}
	// The last claim of each key has to succeed.
	for _, c := range v.Claims {
		if strings.HasSuffix(c.Worker, ".sweep") && c.EndClass != oracle.ClassReleased {
			r.left = append(r.left, fmt.Sprintf("key %d cannot be had in the end: %s %s", c.Key, c.EndClass, c.Text))
		}
	}
	for _, e := range d.Events {
		if strings.Contains(e.Fault, "wall clock") && e.Kind == oracle.Inject && !d.skewSeen(e.At) {
			r.left = append(r.left, "the worker with the wrong clock has the right time")
		}
	}
	for _, e := range v.Excused {
		r.excused[e.Why]++
	}
	d.count(&r, v)
	for i, violation := range v.Violations {
		r.rules[violation.Rule]++
		say("VIOLATION %s", violation)
		if i < 5 {
			d.slice(violation, say)
		}
	}
	for _, left := range r.left {
		say("LEFT OVER %s", left)
	}
	return r
}

// skewSeen reports whether a worker that began after a time read a wrong one.
func (d *recording) skewSeen(after int64) bool {
	for _, e := range d.Events {
		if e.Kind == oracle.Hello && e.At > after {
			read, err := time.Parse(time.RFC3339, e.Text)
			right := time.Unix(0, e.At+d.Offset)
			if err == nil && right.Sub(read).Abs() > 50*time.Minute {
				return true
			}
		}
	}
	return false
}

// count fills the table. Events between the phases belong to the phase before.
func (d *recording) count(r *report, v *oracle.Verdict) {
	lines := map[string]*line{}
	at := func(t int64) *line {
		name := "between the phases"
		for _, p := range d.Phases {
			if t >= p.From && t < p.To {
				name = p.Name
			}
		}
		if lines[name] == nil {
			lines[name] = &line{name: name}
			r.lines = append(r.lines, lines[name])
		}
		return lines[name]
	}
	for _, p := range d.Phases {
		at(p.From).runs += p.Runs
	}
	for _, c := range v.Claims {
		l := at(c.Attempt)
		l.claims++
		l.writes += c.Writes
		l.rejected += c.RejectedBelieving + c.RejectedKnowing
		if c.Locked != 0 {
			l.holds++
		}
		if c.Mode == oracle.ModeFinish {
			l.letFinish++
		}
		switch {
		case c.Ended == 0 && c.Killed != 0:
			l.killed++
		case c.Ended == 0:
			l.hung++
		case c.EndClass == oracle.ClassDisplaced:
			l.displaced++
		case c.EndClass == oracle.ClassBusy:
			l.skipped++
		case c.EndClass == oracle.ClassTimeout:
			l.timedOut++
		case c.EndClass == oracle.ClassFailed, c.EndClass == oracle.ClassContext, c.EndClass == oracle.ClassMax:
			l.failed++
		}
	}
	for _, c := range v.Claims {
		// A loss belongs to the fault that it follows.
		if lost := c.LostAt(); lost != 0 {
			at(lost).lost++
		}
	}
	for _, s := range v.Survival {
		at(s.At).kept += s.Kept
	}
	for _, e := range v.Excused {
		if e.Why != oracle.ExcuseRace && e.Why != oracle.ExcuseCrash {
			at(e.At).overlaps++
		}
	}
	for _, violation := range v.Violations {
		at(violation.At).violations++
	}
	for _, t := range v.Detection {
		if t.Fault == oracle.FaultFrozen {
			r.resumed = append(r.resumed, t.Took)
			continue
		}
		at(t.At).detection = append(at(t.At).detection, t.Took)
	}
}

// slice prints the events around a violation.
func (d *recording) slice(v oracle.Violation, say func(format string, args ...any)) {
	const around, most = int64(6 * time.Second), 90
	n := 0
	events := slices.Clone(d.Events)
	oracle.Sort(events)
	for _, e := range events {
		if e.At < v.At-around || e.At > v.At+around || e.Key != 0 && e.Key != v.Key || e.Kind == oracle.Write && e.OK {
			continue
		}
		if n++; n > most {
			say("    …")
			return
		}
		what := strings.TrimSpace(fmt.Sprintf("%s %s %s %s", e.How, e.Class, e.Fault, strings.Join(e.Victims, ",")))
		if e.Token != 0 {
			what += fmt.Sprintf(" token %d", e.Token)
		}
		say("    %+8.3fs  %-10s %-12s %s  %.150s", float64(e.At-v.At)/1e9, e.Kind, cmp.Or(e.Claim, e.Worker), what, e.Text)
	}
}

func (r *report) add(other report) {
	r.seeds = append(r.seeds, other.seeds...)
	r.took += other.took
	r.violations += other.violations
	r.left = append(r.left, other.left...)
	r.spared += other.spared
	r.suspended += other.suspended
	r.absences = append(r.absences, other.absences...)
	r.resumed = append(r.resumed, other.resumed...)
	if r.excused == nil {
		r.excused = map[string]int{}
	}
	for why, n := range other.excused {
		r.excused[why] += n
	}
	if r.rules == nil {
		r.rules = map[string]int{}
	}
	for rule, n := range other.rules {
		r.rules[rule] += n
	}
	for _, o := range other.lines {
		i := slices.IndexFunc(r.lines, func(l *line) bool { return l.name == o.name })
		if i < 0 {
			r.lines = append(r.lines, o)
			continue
		}
		r.lines[i].plus(o)
	}
}

func (l *line) plus(o *line) {
	l.runs += o.runs
	l.claims += o.claims
	l.holds += o.holds
	l.displaced += o.displaced
	l.timedOut += o.timedOut
	l.letFinish += o.letFinish
	l.skipped += o.skipped
	l.lost += o.lost
	l.kept += o.kept
	l.failed += o.failed
	l.killed += o.killed
	l.hung += o.hung
	l.writes += o.writes
	l.rejected += o.rejected
	l.overlaps += o.overlaps
	l.violations += o.violations
	l.detection = append(l.detection, o.detection...)
}

// table returns the table of docs/reliability.md. The most important columns come first. The other
// figures are in the summary.
func (r *report) table() string {
	var b strings.Builder
	b.WriteString("| fault | runs | violations | holds | lost | kept | failed | excused |\n")
	b.WriteString("|---|--:|--:|--:|--:|--:|--:|--:|\n")
	lines := slices.Clone(r.lines)
	slices.SortStableFunc(lines, func(a, b *line) int { return cmp.Or(rank(a.name)-rank(b.name), cmp.Compare(a.name, b.name)) })
	for _, l := range append([]*line{r.sum()}, lines...) {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %d | %d |\n", l.name, l.runs, l.violations, l.holds, l.lost, l.kept, l.failed, l.overlaps)
	}
	return b.String()
}

// sum returns the line of all faults.
func (r *report) sum() *line {
	sum := &line{name: "**all**"}
	for _, l := range r.lines {
		sum.plus(l)
	}
	return sum
}

func rank(name string) int {
	switch name {
	case "none":
		return 0
	case "mixed":
		return 2
	case "between the phases":
		return 3
	}
	return 1
}

func spread(times []time.Duration) (median, worst string) {
	if len(times) == 0 {
		return "", ""
	}
	slices.Sort(times)
	return seconds(times[len(times)/2]), seconds(times[len(times)-1])
}

func seconds(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func (r *report) summary() string {
	text := fmt.Sprintf("Seeds %s; %v in all; %d violations; left over at the end: %d.\n",
		strings.Join(r.seeds, ", "), r.took.Round(time.Second), r.violations, len(r.left))
	all := r.sum()
	text += fmt.Sprintf("%d claims: %d superseded or notified of a newer claim, %d skipped because the key was busy, %d lock timeouts, %d killed, %d hung. %d let the holder finish; %d holds were spared. %d writes to the fenced resource, %d refused.\n",
		all.claims, all.displaced, all.skipped, all.timedOut, all.killed, all.hung, all.letFinish, r.spared, all.writes, all.rejected)
	if len(all.detection) > 0 {
		median, worst := spread(all.detection)
		text += fmt.Sprintf("Holders were notified of the loss of their session %s (median), %s (worst) after the network went silent or refused them.\n", median, worst)
	}
	if len(r.resumed) > 0 {
		median, worst := spread(r.resumed)
		text += fmt.Sprintf("Frozen holders were notified %s (median), %s (worst) after they resumed.\n", median, worst)
	}
	if r.suspended > 0 {
		median, worst := spread(r.absences)
		text += fmt.Sprintf("Sessions were suspended %d times and reconnected %d times, after %s (median), %s (worst).\n", r.suspended, len(r.absences), median, worst)
	}
	if len(r.rules) > 0 {
		text += "Violations: " + counts(r.rules) + ".\n"
	}
	if len(r.excused) > 0 {
		text += "Excused as documented: " + counts(r.excused) + ".\n"
	}
	return text
}

func counts(of map[string]int) string {
	var parts []string
	for _, what := range slices.Sorted(maps.Keys(of)) {
		parts = append(parts, fmt.Sprintf("%s: %d", what, of[what]))
	}
	return strings.Join(parts, "; ")
}

func (r *report) failure() error {
	if r.violations == 0 && len(r.left) == 0 {
		return nil
	}
	return fmt.Errorf("%d violations, %d things left over", r.violations, len(r.left))
}

// The marks around the table in a file.
const (
	tableBegin = "<!-- table: written by go run ./cmd/driver -table -->"
	tableEnd   = "<!-- end of table -->"
)

func (r *report) writeInto(name string) error {
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(text), tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		return errors.New(name + " has no marks for the table")
	}
	return os.WriteFile(name, []byte(before+tableBegin+"\n\n"+r.table()+"\n"+r.summary()+"\n"+tableEnd+after), 0o644)
}
