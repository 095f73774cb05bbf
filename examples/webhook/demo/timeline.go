package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// timeline prints events as lines of aligned columns.
type timeline struct {
	out    io.Writer
	colour bool // whether to print one colour for each pull request

	begin   time.Time
	events  []Event        // the events so far
	deaths  map[uint]Event // by pull request: its holder was killed and no other job has taken over yet
	running map[uint]Event // by pull request: the job that runs
}

func newTimeline(out *os.File) *timeline {
	return &timeline{out: out, colour: isTerminal(out), deaths: make(map[uint]Event), running: make(map[uint]Event)}
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// settle is how long an event is held before it is printed. Events come from several processes. An
// older event that took longer to arrive is then printed before a newer one.
const settle = 50 * time.Millisecond

// follow prints events until ended is closed, and then the remaining ones.
func (t *timeline) follow(h *history, ended <-chan struct{}) {
	t.line(Event{}, "  time/s", "service", "PR", "what", "delivery", "")
	tick := time.NewTicker(settle / 2)
	defer tick.Stop()
	taken := 0
	var pending []Event
	for over := false; !over; {
		select {
		case <-tick.C:
		case <-ended:
			over = true
		}
		all := h.all()
		pending = append(pending, all[taken:]...)
		taken = len(all)
		slices.SortStableFunc(pending, func(a, b Event) int { return a.Time.Compare(b.Time) })
		for len(pending) > 0 && (over || time.Since(pending[0].Time) > settle) {
			t.print(pending[0])
			pending = pending[1:]
		}
	}
}

func (t *timeline) print(e Event) {
	if t.begin.IsZero() {
		t.begin = e.Time
	}
	t.events = append(t.events, e)
	what, note := t.describe(e)
	if what == "" {
		return
	}
	number, name := "", ""
	if e.PR != 0 {
		number, name = fmt.Sprintf("#%d", e.PR), title(e)
	}
	t.line(e, fmt.Sprintf("%7.3f", e.Time.Sub(t.begin).Seconds()), e.Replica, number, what, name, note)
	for _, row := range e.Table {
		fmt.Fprintf(t.out, "%22s %s\n", "│", row)
	}
}

// describe returns the verb and the note of an event's line. Without a verb there is no line.
func (t *timeline) describe(e Event) (what, note string) {
	switch e.Kind {
	case listening:
		return "● up", ""
	case shuttingDown:
		return "○ shuts down", ""
	case exited:
		return "○ ended", cmp.Or(e.Reason, "cleanly")
	case killed:
		return "✗ KILLED", t.killed(e)
	case received:
		if slices.ContainsFunc(t.events[:len(t.events)-1], func(s Event) bool { return s.Kind == received && s.Delivery == e.Delivery }) {
			return "→ arrives again", "the same delivery"
		}
		return "→ arrives", map[string]string{letFinish: "lets the running one finish", skipIfBusy: "a test: only if none runs"}[e.Mode]
	case outdated:
		return "× outdated", t.cause("too late: after ", e)
	case locks:
		return "≡ GET /locks", ""
	case started:
		note = "token " + shortToken(e.Token)
		t.running[e.PR] = e
		if death, ok := t.deaths[e.PR]; ok {
			delete(t.deaths, e.PR)
			return "► takes over", fmt.Sprintf("%s, %.1f s after the kill of %s", note, e.Time.Sub(death.Time).Seconds(), death.Replica)
		}
		if e.Mode == letFinish && slices.ContainsFunc(t.events, func(s Event) bool { return s.Kind == finished && s.PR == e.PR }) {
			note += fmt.Sprintf(", has waited for %.1f s", t.waited(e).Seconds())
		}
		return "► runs", note
	case notified:
		return "! notified", t.cause("by ", e)
	case stopped:
		delete(t.running, e.PR)
		return "■ stopped", "token " + shortToken(e.Token)
	case left:
		return "← leaves", t.cause("superseded by ", e)
	case skipped:
		return "↷ skipped", t.cause("busy with ", e)
	case finished:
		delete(t.running, e.PR)
		verb := map[string]string{"destroy": "✓ destroyed", "test": "✓ tested"}[e.Job]
		return cmp.Or(verb, "✓ deployed"), "token " + shortToken(e.Token)
	case failed:
		return "✗ FAILED", e.Reason
	default:
		return "", ""
	}
}

// killed describes the jobs of a service that was killed.
func (t *timeline) killed(e Event) string {
	var lost []string
	for number, r := range t.running {
		if r.Replica == e.Replica {
			t.deaths[number] = e
			delete(t.running, number)
			lost = append(lost, fmt.Sprintf("#%d %s", number, title(r)))
		}
	}
	slices.Sort(lost)
	if lost == nil {
		return "by SIGKILL"
	}
	return fmt.Sprintf("by SIGKILL, while it ran %s: a successor has to wait %.0f s", strings.Join(lost, ", "), sessionTimeout.Seconds())
}

// waited returns the time between the arrival of an event's delivery and the event.
func (t *timeline) waited(e Event) time.Duration {
	for _, other := range slices.Backward(t.events) {
		if other.Kind == received && other.Delivery == e.Delivery {
			return e.Time.Sub(other.Time)
		}
	}
	return 0
}

// cause names the delivery for which an event's job made way, or otherwise returns the event's
// reason.
func (t *timeline) cause(verb string, e Event) string {
	if e.By == e.Delivery && e.Kind == outdated {
		return "it is not over yet"
	}
	for _, other := range t.events {
		if other.Kind == sent && other.Delivery == e.By {
			return verb + title(other)
		}
	}
	return e.Reason
}

// tokenDigits is the number of a token's last digits that are shown. On PostgreSQL tokens are about
// as large as the clock in microseconds, so these digits repeat every 100 s.
const tokenDigits = 8

func shortToken(token int64) string {
	s := fmt.Sprint(token)
	if len(s) > tokenDigits {
		s = "…" + s[len(s)-tokenDigits:]
	}
	return s
}

// title returns the name of a delivery for people, such as "synchronize 1f2e3d4".
func title(e Event) string {
	name, _, _ := strings.Cut(e.Event, " delivery ")
	return strings.Replace(name, "review_requested", "review", 1)
}

// palette holds the terminal's colours for pull requests: cyan, yellow, magenta, green.
var palette = []int{36, 33, 35, 32}

func (t *timeline) line(e Event, columns ...string) {
	var b strings.Builder
	for i, width := range []int{9, 8, 5, 16, 21, 0} {
		b.WriteString(columns[i])
		b.WriteString(strings.Repeat(" ", max(0, width-utf8.RuneCountInString(columns[i]))))
	}
	line := strings.TrimRight(b.String(), " ")
	switch {
	case !t.colour:
	case e.Kind == killed || e.Kind == failed:
		line = fmt.Sprintf("\x1b[1;31m%s\x1b[0m", line)
	case e.PR != 0:
		line = fmt.Sprintf("\x1b[%dm%s\x1b[0m", palette[e.PR%uint(len(palette))], line)
	}
	fmt.Fprintln(t.out, line)
}
