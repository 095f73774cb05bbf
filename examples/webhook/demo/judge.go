package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Event is one line of a service's event stream, or an event that the driver has added.
type Event struct {
	Time     time.Time `json:"time"`
	Kind     string    `json:"msg"`
	Replica  string    `json:"replica"`
	Repo     string    `json:"repo"`
	PR       uint      `json:"pr"`
	Job      string    `json:"job"`
	Event    string    `json:"event"`
	Delivery string    `json:"delivery"`
	Token    int64     `json:"token"`
	Reason   string    `json:"reason"`
	Addr     string    `json:"addr"`
	Ops      string    `json:"ops"`
	Mode     string    `json:"mode"`
	By       string    `json:"by"`      // the delivery for which this one makes way, or the one at work
	Outcome  string    `json:"outcome"` // of a notification's cause, and of a failure

	// Of "reports".
	Conclusion string `json:"conclusion"`
	Summary    string `json:"summary"`

	Page  string   `json:"-"` // of sent: the page of the commit, for people
	Table []string `json:"-"` // of locks: the table
}

// The modes of claims.
const (
	preempt    = "preempt"
	letFinish  = "let_finish"
	skipIfBusy = "skip_if_busy"
)

// The events of a service. It logs "started", and then "stopped" or "finished", while it holds the
// lock.
const (
	listening    = "listening"
	shuttingDown = "shutting down"
	received     = "received"
	started      = "started"
	notified     = "notified"
	stopped      = "stopped"
	finished     = "finished"
	left         = "left"
	outdated     = "outdated"
	skipped      = "skipped"
	reports      = "reports"
	failed       = "failed"
)

// preempted is the outcome of a notification by a newer claim.
const preempted = "preempted"

// The events that the driver adds.
const (
	sent   = "sent"   // a delivery was sent
	resent = "resent" // a delivery was sent once more, with the same id
	locks  = "locks"  // a service was asked for all locks
	killed = "killed" // a service was killed with SIGKILL, and its process has ended
	exited = "exited" // a service has ended otherwise, and Reason is empty if it was asked to end and did so without an error
)

// sessionTimeout is how long the successor of a killed holder has to wait: the session timeout of the
// library.
const sessionTimeout = 10 * time.Second

// skipTime is how long a service may take to find out that a job is at work. If a delivery that may
// be skipped starts later than that, and after a job has ended, it has waited.
const skipTime = workTime / 3

// pull is what the judge knows about one pull request.
type pull struct {
	repo     string
	pr       uint
	newest   Event                // the newest delivery that was sent, except for those that may be skipped
	sent     map[string]Event     // by delivery: when it was sent for the first time
	place    map[string]int       // by delivery: its place in the order in which they were first sent, from 1
	again    map[string]bool      // deliveries that were sent once more
	ended    map[string]time.Time // by delivery: when it ended
	by       map[string]string    // by delivery and replica: the delivery for which it made way or was skipped
	open     []Event              // deliveries that were sent and have not ended
	running  []Event              // jobs that have started and not ended
	latest   Event                // the job that started last, except for those that may be skipped
	token    int64                // of the job that started last
	orphaned time.Time            // when the holder was killed, until another job takes over

	latestEnd time.Time // when a job ended last

	deliveries, ran, stopped, left, outdated, skipped, finished, killed, overlaps int
	newestFinished                                                                bool
}

func newPull(repo string, pr uint) *pull {
	return &pull{repo: repo, pr: pr, sent: make(map[string]Event), place: make(map[string]int), again: make(map[string]bool),
		ended: make(map[string]time.Time), by: make(map[string]string)}
}

// judge returns what it saw of each pull request, and one sentence for each promise that the
// service has broken. For each pull request it requires:
//
//   - Two jobs never run concurrently.
//   - Tokens grow.
//   - No older job runs after a newer one.
//   - A delivery is outdated only because of a newer one, or because it was sent once more.
//   - No job is stopped by its own redelivery.
//   - No job is notified if all newer deliveries let it finish.
//   - No job is stopped by a delivery that may be skipped. Such a delivery is not skipped without a
//     reason, and does not wait.
//   - Every commit shows the one that has taken its place.
//   - No successor starts too early after a holder was killed.
//   - Every delivery that was sent has ended.
//   - The newest delivery finishes.
//
// It also requires that each process ends without an error.
func judge(events []Event) (pulls []*pull, faults []string) {
	events = slices.Clone(events)
	slices.SortStableFunc(events, func(a, b Event) int { return a.Time.Compare(b.Time) })
	fault := func(e Event, format string, args ...any) {
		faults = append(faults, fmt.Sprintf("%7.3f  ", e.Time.Sub(events[0].Time).Seconds())+fmt.Sprintf(format, args...))
	}

	alive := make(map[string]Event) // services that have not ended
	for _, e := range events {
		switch e.Kind {
		case listening:
			alive[e.Replica] = e
		case exited:
			delete(alive, e.Replica)
			if e.Reason != "" {
				fault(e, "%s did not end well: %s", e.Replica, e.Reason)
			}
		case killed:
			delete(alive, e.Replica)
			for _, p := range pulls {
				p.lose(e)
			}
		default:
			if e.PR == 0 {
				if e.Kind == failed {
					fault(e, "%s: %s", e.Replica, e.Reason)
				}
				continue
			}
			i := slices.IndexFunc(pulls, func(p *pull) bool { return p.repo == e.Repo && p.pr == e.PR })
			if i < 0 {
				i = len(pulls)
				pulls = append(pulls, newPull(e.Repo, e.PR))
			}
			for _, broken := range pulls[i].see(e) {
				fault(e, "#%d: %s", e.PR, broken)
			}
		}
	}

	slices.SortFunc(pulls, func(a, b *pull) int { return int(a.pr) - int(b.pr) })
	for _, p := range pulls {
		for _, e := range p.running {
			fault(e, "#%d: %s started and never ended", p.pr, e.Event)
			p.settle(e)
		}
		for _, e := range p.open {
			fault(e, "#%d: nothing was heard of %s", p.pr, e.Event)
		}
		if !p.newestFinished {
			fault(p.newest, "#%d: the newest delivery, %s, did not finish", p.pr, p.newest.Event)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(alive)) {
		fault(alive[name], "%s never ended", name)
	}
	if len(pulls) == 0 {
		faults = append(faults, "nothing was delivered")
	}
	return pulls, faults
}

// see processes the next event of the pull request and returns the promises that it breaks.
func (p *pull) see(e Event) (broken []string) {
	complain := func(format string, args ...any) { broken = append(broken, fmt.Sprintf(format, args...)) }

	switch e.Kind {
	case sent:
		p.sent[e.Delivery] = e
		p.place[e.Delivery] = len(p.place) + 1
		if e.Mode != skipIfBusy {
			p.newest, p.newestFinished = e, false
		}
	case resent:
		p.again[e.Delivery] = true
	}
	if e.Kind == sent || e.Kind == resent {
		p.deliveries++
		p.open = append(p.open, e)
		return nil
	}
	if p.place[e.Delivery] == 0 {
		complain("%s %s, but was never sent", e.Event, e.Kind)
	}
	mode := p.sent[e.Delivery].Mode
	if e.By != "" {
		p.by[e.Delivery+" "+e.Replica] = e.By
		if e.Kind != skipped && p.sent[e.By].Mode == skipIfBusy {
			complain("%s was disturbed by %s, which takes the lock only if it is free", e.Event, p.sent[e.By].Event)
		}
	}
	switch e.Kind {
	case started:
		p.ran++
		for _, other := range p.running {
			p.overlaps++
			complain("two ran together: %s on %s started while %s ran on %s", e.Event, e.Replica, other.Event, other.Replica)
		}
		if e.Token <= p.token {
			complain("the token went from %d to %d with %s", p.token, e.Token, e.Event)
		}
		if mode == skipIfBusy {
			if at := p.sent[e.Delivery].Time; e.Time.Sub(at) > skipTime && p.latestEnd.After(at) {
				complain("%s waited for another job, and should have been skipped", e.Event)
			}
		} else {
			if p.place[e.Delivery] < p.place[p.latest.Delivery] {
				complain("%s ran after the newer %s", e.Event, p.latest.Event)
			}
			p.latest = e
		}
		if wait := e.Time.Sub(p.orphaned); !p.orphaned.IsZero() && wait < sessionTimeout {
			complain("%s took over %.1f s after a holder was killed; the session timeout is %.0f s", e.Event, wait.Seconds(), sessionTimeout.Seconds())
		}
		p.orphaned = time.Time{}
		delete(p.by, e.Delivery+" "+e.Replica)
		p.token = e.Token
		p.running = append(p.running, e)

	case stopped, finished:
		i := slices.IndexFunc(p.running, func(r Event) bool { return r.Delivery == e.Delivery && r.Replica == e.Replica })
		if i < 0 {
			complain("%s %s without having started", e.Event, e.Kind)
			break
		}
		if e.Token != p.running[i].Token {
			complain("%s started with token %d and ended with %d", e.Event, p.running[i].Token, e.Token)
		}
		p.running = slices.Delete(p.running, i, i+1)
		p.latestEnd = e.Time
		p.settle(e)
		if e.Kind == stopped {
			p.stopped++
			break
		}
		p.finished++
		if e.Delivery == p.newest.Delivery {
			p.newestFinished = true
		}

	case notified, left:
		if e.By == e.Delivery {
			complain("%s was disturbed by its own redelivery", e.Event)
		}
		if e.Kind == notified && e.Outcome == preempted {
			if e.By == "" {
				complain("%s was notified, and not for which delivery", e.Event)
			}
			if !p.preempted(e.Delivery) {
				complain("%s was notified, though everything newer lets it finish", e.Event)
			}
		}
		if e.Kind == left {
			if mode == skipIfBusy && e.By != "" {
				complain("%s waited for another job, and should have been skipped", e.Event)
			}
			p.left++
			p.settle(e)
		}
	case outdated:
		p.outdated++
		// A redelivery of the delivery at work reports nothing. The delivery at work does.
		if e.By == e.Delivery {
			delete(p.by, e.Delivery+" "+e.Replica)
		}
		if p.newest.Delivery == e.Delivery && !p.again[e.Delivery] {
			complain("%s was outdated, though nothing newer had been sent", e.Event)
		}
		p.settle(e)
	case skipped:
		p.skipped++
		p.settle(e)
		if mode != skipIfBusy {
			complain("%s was skipped, though it has to wait for its turn", e.Event)
		}
		if e.By != "" && !p.busy(e) {
			complain("%s was skipped for %s, which was not at work", e.Event, e.By)
		}
	case reports:
		if page := p.sent[p.by[e.Delivery+" "+e.Replica]].Page; page != "" && e.Conclusion != "failure" && !strings.HasSuffix(e.Summary, " "+page) {
			complain("%s shows %q, and not that %s has taken its place", e.Event, e.Summary, page)
		}
	case failed:
		complain("%s failed: %s", e.Event, e.Reason)
		p.settle(e)
	}
	return broken
}

// preempted reports whether a later delivery was sent that tells the delivery's job to stop.
func (p *pull) preempted(delivery string) bool {
	for id, e := range p.sent {
		if p.place[id] > p.place[delivery] && e.Mode != letFinish && e.Mode != skipIfBusy {
			return true
		}
	}
	return false
}

// busy reports whether the delivery that a skipped one names was at work or waited at that time.
func (p *pull) busy(e Event) bool {
	if e.By != e.Delivery && slices.ContainsFunc(p.open, func(s Event) bool { return s.Delivery == e.By }) {
		return true
	}
	return p.ended[e.By].After(p.sent[e.Delivery].Time)
}

// settle records the end of a delivery.
func (p *pull) settle(e Event) {
	p.ended[e.Delivery] = e.Time
	i := slices.IndexFunc(p.open, func(s Event) bool { return s.Delivery == e.Delivery && s.Replica == e.Replica })
	if i >= 0 {
		p.open = slices.Delete(p.open, i, i+1)
	}
}

// lose removes the jobs of a killed service, and the deliveries that it had accepted.
func (p *pull) lose(e Event) {
	p.running = slices.DeleteFunc(p.running, func(r Event) bool {
		if r.Replica != e.Replica {
			return false
		}
		p.killed++
		p.orphaned = e.Time
		return true
	})
	p.open = slices.DeleteFunc(p.open, func(s Event) bool { return s.Replica == e.Replica })
}
