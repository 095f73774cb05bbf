package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/preemptable/locker"
)

// beat is the pause between two deliveries that do not come in a burst. It is shorter than a job,
// and shorter than the winding down of a job.
const beat = 200 * time.Millisecond

// stage contains what a story uses.
type stage struct {
	services []*service
	sender   *sender
	history  *history
}

// together plays several pull requests concurrently.
func (s *stage) together(ctx context.Context, parts ...func(context.Context) error) error {
	errs := make(chan error, len(parts))
	for _, part := range parts {
		go func() { errs <- part(ctx) }()
	}
	var err error
	for range parts {
		err = errors.Join(err, <-errs)
	}
	return err
}

// pr is one pull request in a story. Its methods do nothing once one of them has failed. The reason
// is in err.
type pr struct {
	ctx    context.Context
	stage  *stage
	number uint
	branch string
	head   string
	sent   map[string]delivery // by id
	err    error
}

func (s *stage) pr(ctx context.Context, number uint) *pr {
	return &pr{ctx: ctx, stage: s, number: number, branch: "changes", sent: make(map[string]delivery)}
}

// mode returns the mode that the service uses for a delivery: let_finish for the pushes to a
// release's branch, skip_if_busy for a test, and otherwise preempt.
func (p *pr) mode(action string) string {
	switch {
	case action == "review_requested":
		return skipIfBusy
	case action != "closed" && strings.HasPrefix(p.branch, releases):
		return letFinish
	default:
		return preempt
	}
}

// deliver sends a delivery to a service and returns its id once it has been accepted. A push has a
// new head commit.
func (p *pr) deliver(to *service, action string) (id string) {
	if p.err != nil {
		return ""
	}
	if action == "opened" || action == "synchronize" {
		p.head = randomCommit()
	}
	d, err := p.stage.sender.prepare(action, p.number, p.branch, p.head)
	return p.send(to, action, d, err)
}

// replay sends a recorded delivery, byte for byte. The pull request has to be the recorded one.
func (p *pr) replay(to *service, action string) (id string) {
	if p.err != nil {
		return ""
	}
	d, err := p.stage.sender.asRecorded(action)
	return p.send(to, action, d, err)
}

func (p *pr) send(to *service, action string, d delivery, err error) (id string) {
	if err == nil {
		p.sent[d.id] = d
		p.stage.history.add(Event{
			Kind: sent, Replica: to.name, Repo: d.repo, PR: d.pr, Delivery: d.id, Mode: p.mode(action), Page: d.page,
			Event: fmt.Sprintf("%s %.7s delivery %.8s", action, d.head, d.id),
		})
		err = p.stage.sender.post(p.ctx, to.url, d)
	}
	p.err = err
	return d.id
}

// again sends a delivery once more, like GitHub on request, and waits until it has been turned
// away.
func (p *pr) again(to *service, id string) {
	if p.err != nil {
		return
	}
	d := p.sent[id]
	p.stage.history.add(Event{Kind: resent, Replica: to.name, Repo: d.repo, PR: d.pr, Delivery: d.id})
	if p.err = p.stage.sender.post(p.ctx, to.url, d); p.err == nil {
		p.sees(outdated, id)
	}
}

// claimed waits until the delivery's claim is announced: until its job runs, or another one has
// made way for it.
func (p *pr) claimed(id string) {
	p.await("the claim of "+id, func(e Event) bool {
		return e.Kind == started && e.Delivery == id || (e.Kind == notified || e.Kind == left) && e.By == id && e.Delivery != id
	})
}

// sees waits for an event of a delivery.
func (p *pr) sees(kind, id string) {
	p.await(id+" "+kind, func(e Event) bool { return e.Kind == kind && e.Delivery == id })
}

// skipped waits until a test has been skipped, or has run because on a slow machine no job ran at
// that moment.
func (p *pr) skipped(id string) {
	p.await(id+" skipped", func(e Event) bool { return (e.Kind == skipped || e.Kind == finished) && e.Delivery == id })
}

// locks asks a service for all locks.
func (p *pr) locks(from *service) {
	if p.err != nil {
		return
	}
	var holders []locker.LockStatus
	holders, p.err = p.stage.sender.holders(p.ctx, from.ops)
	p.stage.history.add(Event{Kind: locks, Replica: from.name, Table: p.stage.table(holders)})
}

// table formats the result of ListLocks for people.
func (s *stage) table(holders []locker.LockStatus) []string {
	name := func(pid int) string {
		for _, service := range s.services {
			if service.cmd.Process.Pid == pid {
				return service.name
			}
		}
		return fmt.Sprint(pid)
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PR\tholder\tin\tsession\theld for\ttoken\tstop asked\tnewest claim")
	for _, h := range holders {
		holder, in, session, since, token, asked, newest := "none", "", "", "", "", "", "its own"
		if h.Event != "" {
			holder, in, session = title(Event{Event: h.Event}), name(h.PID), "DEAD"
			if h.Alive {
				session = "alive"
			}
			since, token = fmt.Sprintf("%.1f s", time.Since(h.Since).Seconds()), shortToken(h.Token)
			asked = "no"
			if h.StopAsked {
				asked = "yes"
			}
		}
		if h.NewestEvent != h.Event {
			newest = title(Event{Event: h.NewestEvent})
			if h.Waiting {
				newest += " waits in " + name(h.NewestPID)
			}
		}
		fmt.Fprintf(w, "#%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", h.PullRequest, holder, in, session, since, token, asked, newest)
	}
	// Flush never fails on a strings.Builder.
	_ = w.Flush()
	return strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
}

// pause lets a moment pass, so that a person can follow the story. Nothing depends on it.
func (p *pr) pause(d time.Duration) {
	if p.err != nil {
		return
	}
	select {
	case <-time.After(d):
	case <-p.ctx.Done():
		p.err = context.Cause(p.ctx)
	}
}

func (p *pr) await(what string, wanted func(Event) bool) {
	if p.err == nil {
		_, p.err = p.stage.history.wait(p.ctx, what, wanted)
	}
}

// playInMemory is the story of one service.
func playInMemory(ctx context.Context, s *stage) error {
	one := s.services[0]
	return s.together(ctx,
		// The pull request gets pushes while it runs and while it waits, and is closed while it
		// runs.
		func(ctx context.Context) error {
			p := s.pr(ctx, 7)
			p.sees(started, p.deliver(one, "opened"))
			p.pause(3 * beat)
			p.claimed(p.deliver(one, "synchronize"))
			p.pause(beat)
			p.sees(started, p.deliver(one, "synchronize"))
			p.pause(4 * beat)
			p.sees(finished, p.deliver(one, "closed"))
			return p.err
		},
		// There is a burst of pushes, and then one more while the last of them runs.
		func(ctx context.Context) error {
			p := s.pr(ctx, 8)
			p.sees(started, p.deliver(one, "opened"))
			p.pause(5 * beat)
			last := ""
			for range 5 {
				last = p.deliver(one, "synchronize")
			}
			p.sees(started, last)
			p.pause(6 * beat)
			p.sees(finished, p.deliver(one, "synchronize"))
			return p.err
		},
		// No job of this pull request is notified.
		func(ctx context.Context) error {
			p := s.pr(ctx, 9)
			opened := p.deliver(one, "opened")
			p.sees(started, opened)
			p.pause(2 * beat)
			// Not even a redelivery of the delivery at work stops it.
			p.again(one, opened)
			p.sees(finished, opened)
			push := p.deliver(one, "synchronize")
			p.sees(started, push)
			p.pause(2 * beat)
			// A test does not stop it either.
			p.skipped(p.deliver(one, "review_requested"))
			p.sees(finished, push)
			p.sees(finished, p.deliver(one, "closed"))
			return p.err
		},
		// On this branch a running job may finish. Of the deliveries that wait the newest is next.
		func(ctx context.Context) error {
			p := s.pr(ctx, 11)
			p.branch = releases + "1.4"
			p.sees(started, p.deliver(one, "opened"))
			p.pause(2 * beat)
			p.deliver(one, "synchronize")
			p.pause(2 * beat)
			p.sees(finished, p.deliver(one, "synchronize"))
			return p.err
		},
		// These are recorded deliveries, byte for byte. The push comes once more after the end.
		func(ctx context.Context) error {
			p := s.pr(ctx, 2)
			push := p.replay(one, "synchronize")
			p.sees(finished, push)
			p.sees(finished, p.replay(one, "closed"))
			p.pause(beat)
			p.again(one, push)
			return p.err
		},
	)
}

// playOnPostgres is the story of three services on one database.
func playOnPostgres(ctx context.Context, s *stage) error {
	one, two, three := s.services[0], s.services[1], s.services[2]
	err := s.together(ctx,
		// Every push arrives at another service.
		func(ctx context.Context) error {
			p := s.pr(ctx, 7)
			p.sees(started, p.deliver(one, "opened"))
			p.pause(3 * beat)
			p.claimed(p.deliver(two, "synchronize"))
			p.locks(three)
			p.pause(beat)
			p.sees(started, p.deliver(three, "synchronize"))
			p.pause(4 * beat)
			p.sees(finished, p.deliver(one, "closed"))
			return p.err
		},
		// Many pushes arrive at the services in turn.
		func(ctx context.Context) error {
			p := s.pr(ctx, 8)
			last := p.deliver(three, "opened")
			for i := range 6 {
				p.claimed(last)
				p.pause(2 * beat)
				last = p.deliver(s.services[i%3], "synchronize")
			}
			p.sees(finished, last)
			return p.err
		},
		// A burst of pushes arrives at one service.
		func(ctx context.Context) error {
			p := s.pr(ctx, 9)
			p.sees(started, p.deliver(one, "opened"))
			p.pause(5 * beat)
			last := ""
			for range 5 {
				last = p.deliver(two, "synchronize")
			}
			p.sees(finished, last)
			return p.err
		},
		// On this branch a running job may finish. Of the deliveries that wait the newest is next.
		func(ctx context.Context) error {
			p := s.pr(ctx, 11)
			p.branch = releases + "1.4"
			p.sees(started, p.deliver(two, "opened"))
			p.pause(2 * beat)
			p.deliver(three, "synchronize")
			p.pause(2 * beat)
			p.sees(finished, p.deliver(one, "synchronize"))
			return p.err
		},
	)
	if err != nil {
		return err
	}
	return s.together(ctx,
		// The service is killed while it works. The successor has to wait for the session timeout.
		func(ctx context.Context) error {
			p := s.pr(ctx, 10)
			p.sees(started, p.deliver(three, "opened"))
			p.pause(2 * beat)
			if p.err == nil {
				p.err = three.kill()
			}
			p.pause(2 * beat)
			p.locks(one)
			p.deliver(two, "synchronize")
			p.pause(2 * beat)
			p.sees(finished, p.deliver(two, "synchronize"))
			p.sees(finished, p.deliver(one, "closed"))
			return p.err
		},
		// Another pull request is not affected.
		func(ctx context.Context) error {
			p := s.pr(ctx, 9)
			push := p.deliver(two, "synchronize")
			p.sees(started, push)
			p.pause(2 * beat)
			// The other service finds out that two is at work.
			p.skipped(p.deliver(one, "review_requested"))
			p.sees(finished, push)
			p.sees(finished, p.deliver(one, "closed"))
			// The delivery is late, and arrives at another service than the one that has seen the
			// newer one.
			p.again(two, push)
			return p.err
		},
	)
}
