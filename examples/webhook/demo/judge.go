package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Event is one line of a service's event stream, or something that the driver did itself.
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

	Table []string `json:"-"` // of locks
}

// What a service says. It says started, and then stopped or finished, while it holds the lock.
const (
	listening    = "listening"
	shuttingDown = "shutting down"
	received     = "received"
	started      = "started"
	toldToStop   = "told to stop"
	stopped      = "stopped"
	finished     = "finished"
	left         = "left"
	turnedAway   = "turned away"
	failed       = "failed"
)

// What the driver adds.
const (
	sent   = "sent"   // it sends a delivery
	resent = "resent" // it sends one once more, with the same id
	locks  = "locks"  // it has asked a service who holds and who waits
	killed = "killed" // it ended a service by SIGKILL; the process is gone
	exited = "exited" // a service has ended otherwise; Reason is empty if it was asked to and ended well
)

// lockDelay is what the library waits before the successor of a holder that died may work.
const lockDelay = 10 * time.Second

// pull is what the judge knows of one pull request.
type pull struct {
	repo     string
	pr       uint
	newest   Event           // the newest delivery that was sent
	place    map[string]int  // of each delivery in the order of sending for the first time, from 1
	again    map[string]bool // deliveries that were sent once more
	open     []Event         // what was sent and has not come to an end
	running  []Event         // jobs that have started and not ended
	latest   Event           // the job that started last
	orphaned time.Time       // when the holder was killed, until somebody takes over

	deliveries, ran, stopped, left, turnedAway, finished, killed, overlaps int
	newestFinished                                                         bool
}

// judge says whether the events tell of a service that kept its promises. On each pull request: never two jobs
// at once, tokens that grow, no older job after a newer one, nobody turned away but by a newer delivery or because
// it was sent once more, nobody disturbed by his own redelivery, no successor too early after a death, everything
// that was sent accounted for, and the newest finished. And each process ended well. It answers what it saw of
// each pull request, and one sentence for each broken promise.
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
				pulls = append(pulls, &pull{repo: e.Repo, pr: e.PR, place: make(map[string]int), again: make(map[string]bool)})
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

// see takes the next event of the pull request and answers which promises it breaks.
func (p *pull) see(e Event) (broken []string) {
	complain := func(format string, args ...any) { broken = append(broken, fmt.Sprintf(format, args...)) }

	switch e.Kind {
	case sent:
		p.place[e.Delivery] = len(p.place) + 1
		p.newest, p.newestFinished = e, false
	case resent:
		p.again[e.Delivery] = true
	}
	if e.Kind == sent || e.Kind == resent {
		p.deliveries++
		p.open = append(p.open, e)
		return nil
	}
	if p.place[e.Delivery] == 0 {
		complain("%s %s, but nobody sent it", e.Event, e.Kind)
	}
	switch e.Kind {
	case started:
		p.ran++
		for _, other := range p.running {
			p.overlaps++
			complain("two ran together: %s on %s started while %s ran on %s", e.Event, e.Replica, other.Event, other.Replica)
		}
		if e.Token <= p.latest.Token {
			complain("the token went from %d to %d with %s", p.latest.Token, e.Token, e.Event)
		}
		if p.place[e.Delivery] < p.place[p.latest.Delivery] {
			complain("%s ran after the newer %s", e.Event, p.latest.Event)
		}
		if wait := e.Time.Sub(p.orphaned); !p.orphaned.IsZero() && wait < lockDelay {
			complain("%s took over %.1f s after a holder was killed; the lock delay is %.0f s", e.Event, wait.Seconds(), lockDelay.Seconds())
		}
		p.orphaned = time.Time{}
		p.latest = e
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
		p.settle(e)
		if e.Kind == stopped {
			p.stopped++
			break
		}
		p.finished++
		if e.Delivery == p.newest.Delivery {
			p.newestFinished = true
		}

	case toldToStop, left:
		if strings.Contains(e.Reason, fmt.Sprintf("newer claim %q", e.Event)) {
			complain("%s was disturbed by its own redelivery", e.Event)
		}
		if e.Kind == left {
			p.left++
			p.settle(e)
		}
	case turnedAway:
		p.turnedAway++
		if p.newest.Delivery == e.Delivery && !p.again[e.Delivery] {
			complain("%s was turned away, though nothing newer had been sent", e.Event)
		}
		p.settle(e)
	case failed:
		complain("%s failed: %s", e.Event, e.Reason)
		p.settle(e)
	}
	return broken
}

// settle notes the end of something that was sent.
func (p *pull) settle(e Event) {
	i := slices.IndexFunc(p.open, func(s Event) bool { return s.Delivery == e.Delivery && s.Replica == e.Replica })
	if i >= 0 {
		p.open = slices.Delete(p.open, i, i+1)
	}
}

// lose forgets what a killed service ran and what it had accepted.
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
