package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/lib/pq"

	"github.com/preemptable/locker"
	"github.com/preemptable/locker/internal/pgserver"
)

// restarts measures how the locks of one provider survive restarts of the server.
func (b *bench) restarts() {
	server, err := pgserver.Start(b.ctx, pgserver.Options{})
	if errors.Is(err, pgserver.ErrNoBinaries) {
		fmt.Fprintln(os.Stderr, "bench: restart needs a separate server:", err)
		return
	}
	check(err)
	defer func() { _ = server.Close() }()
	for _, held := range []int{1000, 10_000} {
		b.restartsWith(server, held)
	}
}

// restarted is a provider that holds locks on a server that is restarted.
type restarted struct {
	*bench
	server      *pgserver.Server
	uri         string
	channels    []<-chan locker.NotificationPayload
	reconnected chan time.Time // when the observer was called
}

func (b *bench) restartsWith(server *pgserver.Server, held int) {
	uri := must(server.CreateDatabase(b.ctx, "restart"))
	r := &restarted{
		bench: b, server: server, uri: uri,
		channels: make([]<-chan locker.NotificationPayload, held), reconnected: make(chan time.Time, 100),
	}
	p := newProvider(uri, locker.WithPreemptionTimeout(time.Millisecond), locker.WithObserver(func(o locker.Observation) {
		if o.Kind == locker.ObservedReconnected {
			r.reconnected <- time.Now()
		}
	}))
	defer func() { _ = p.Close() }()
	f := newFactory(p)
	locks := make([]*locker.PreemptiveLocker, held)
	check(each(held, func(i int) (err error) {
		locks[i-1] = f("org/repo", uint(i), "benchmark")
		r.channels[i-1], err = locks[i-1].Lock(b.ctx)
		return err
	}))
	for _, mode := range []string{pgserver.Fast, pgserver.Immediate} {
		r.measure(mode)
	}
	check(each(held, func(i int) error { return locks[i-1].Release(b.ctx) }))
}

// measure restarts the server several times.
func (r *restarted) measure(mode string) {
	repeat := 3
	if r.scale < 1 {
		repeat = 1
	}
	c := newComparison()
	for range repeat {
		c.begin()
		ours, floor := r.once(mode)
		c.ours.add(ours)
		c.floor.add(floor)
	}
	// A later heartbeat may find more.
	time.Sleep(r.span(5 * time.Second))
	group := fmt.Sprintf("%s restart of the server, %s held by one provider", mode, plural(len(r.channels), "lock"))
	r.result.add(
		row{Group: group, Name: "holds notified or lost", Ours: value(float64(r.disturbed())), Target: atMost(0)},
		row{
			Group: group, Name: "server takes connections → reconnected", Unit: "ms", Ours: spread(millis(c.ours)), Floor: spread(millis(c.floor)),
			What: "one raw connection", Ratio: c.ratio(), Target: atMost(1000),
		},
	)
}

func millis(r rounds) (all []float64) {
	for _, d := range r.medians() {
		all = append(all, ms(d))
	}
	return all
}

// once restarts the server. It returns two times that begin when the server accepts connections
// again: until the session has reconnected and all of its holds are checked, and until a raw
// connection is open.
func (r *restarted) once(mode string) (ours, floor time.Duration) {
	for len(r.reconnected) > 0 {
		<-r.reconnected
	}
	check(r.server.Stop(mode))
	uri := r.server.URI("postgres")
	type connection struct{ begun, made time.Time }
	first := make(chan connection, 1)
	ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
	defer cancel()
	go func() {
		begun, made := firstConnection(ctx, uri)
		first <- connection{begun, made}
	}()
	check(r.server.Start(r.ctx))
	raw := <-first
	check(ctx.Err())
	select {
	case at := <-r.reconnected:
		return at.Sub(raw.begun), raw.made.Sub(raw.begun)
	case <-ctx.Done():
		check(errors.New("the session has not reconnected within a minute"))
		return 0, 0
	}
}

// firstConnection connects until it succeeds. It returns the start and the end of the attempt that
// succeeded.
func firstConnection(ctx context.Context, uri string) (begun, made time.Time) {
	for ctx.Err() == nil {
		begun = time.Now()
		conn, err := pq.Open(uri)
		if err == nil {
			made = time.Now()
			_ = conn.Close()
			return begun, made
		}
		time.Sleep(2 * time.Millisecond)
	}
	return begun, begun
}

// disturbed returns the number of holders that were notified, or of rows that do not name a holder
// any longer if that is larger.
func (r *restarted) disturbed() int {
	notified := 0
	for _, ch := range r.channels {
		select {
		case <-ch:
			notified++
		default:
		}
	}
	db := openDB(r.uri, 1)
	defer func() { _ = db.Close() }()
	var rows int
	check(db.QueryRowContext(r.ctx, `SELECT count(*) FROM env_lock_state WHERE holder_id IS NOT NULL`).Scan(&rows))
	return max(notified, len(r.channels)-rows)
}
