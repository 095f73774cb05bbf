// The worker is a process that uses the lock like a service, through its public interface alone. It
// writes to a fenced resource while it believes that it holds, and prints its events on standard
// output, one JSON object per line. It ends with its standard input.
package main

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	_ "github.com/lib/pq" // the driver for the fenced resource

	"github.com/preemptable/locker"
	"github.com/preemptable/locker/chaos/broken"
	"github.com/preemptable/locker/chaos/oracle"
)

const repo = "chaos/resource"

type worker struct {
	name     string
	base     int64 // keys are base+1 … base+keys
	keys     int
	maxHold  time.Duration
	notify   time.Duration
	preempt  time.Duration
	provider locker.LockProvider
	newOne   locker.PreemptiveLockerFactory
	fence    *sql.DB
	claims   atomic.Int64
	stopping chan struct{}
	running  sync.WaitGroup

	mu  sync.Mutex // guards out
	out io.Writer
}

func main() {
	uri := flag.String("uri", "", "the server that keeps the locks")
	fence := flag.String("fence", "", "the server of the fenced resource")
	kind := flag.String("provider", "real", "real, or one of package broken")
	clients := flag.Int("clients", 3, "claims at a time")
	seed := flag.Uint64("seed", 1, "of the claims' timing")
	lockTimeout := flag.Duration("lock-timeout", 17*time.Second, "of the provider")
	sessionTimeout := flag.Duration("session-timeout", 10*time.Second, "of the provider")
	progress := flag.Int("progress", 0, "of the provider: holds in a row that claims may end; 0: any number")
	spared := flag.Duration("spared", 5*time.Second, "of the provider: for how long the next one is let finish")
	sweep := flag.Bool("sweep", false, "lock and release every key once, then end")
	verbose := flag.Bool("v", false, "the provider's log on standard error")
	w := &worker{out: os.Stdout, stopping: make(chan struct{})}
	flag.StringVar(&w.name, "name", "w", "in the history")
	flag.Int64Var(&w.base, "base", 0, "the number before the first key")
	flag.IntVar(&w.keys, "keys", 8, "how many keys")
	flag.DurationVar(&w.maxHold, "max-hold", 6*time.Second, "longest hold of most claims; every third is longer")
	flag.DurationVar(&w.notify, "notify-timeout", 15*time.Second, "for LockKey and Notify")
	flag.DurationVar(&w.preempt, "preemption-timeout", 3*time.Second, "of the provider")
	flag.Parse()

	commands := make(chan string, 16)
	go func() {
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			commands <- in.Text()
		}
		// The driver has ended.
		os.Exit(1)
	}()
	level := slog.LevelWarn
	if !*verbose {
		level = slog.LevelError + 1
	}
	idle := runtime.NumGoroutine()
	if err := w.open(*uri, *fence, *kind, *lockTimeout, *sessionTimeout, *progress, *spared, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))); err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		os.Exit(2)
	}
	w.emit(oracle.Event{Kind: oracle.Hello, Timeout: int64(*sessionTimeout), Text: time.Now().Round(0).UTC().Format(time.RFC3339)})
	if *sweep {
		w.sweep()
	} else {
		for i := range *clients {
			w.running.Add(1)
			go w.client(rand.New(rand.NewPCG(*seed, uint64(i))))
		}
		for command := range commands {
			if command == "stop" {
				break
			}
			w.do(command)
		}
	}
	w.end(idle)
}

func (w *worker) open(uri, fence, kind string, lockTimeout, sessionTimeout time.Duration, progress int, spared time.Duration, logger *slog.Logger) (err error) {
	if w.fence, err = sql.Open("postgres", fence); err != nil {
		return err
	}
	w.fence.SetMaxOpenConns(8)
	w.fence.SetMaxIdleConns(8)
	if kind == "real" {
		w.provider, err = locker.NewLockProvider(locker.PostgresLockProviderKind,
			locker.WithPostgresBackend(uri, ""), locker.WithLockTimeout(lockTimeout), locker.WithPreemptionTimeout(w.preempt),
			locker.WithSessionTimeout(sessionTimeout), locker.WithProgress(progress, spared), locker.WithObserver(w.observe), locker.WithLogger(logger))
	} else {
		w.provider, err = broken.New(kind, uri, broken.Options{LockTimeout: lockTimeout, SessionTimeout: sessionTimeout, Progress: progress, Spared: spared})
	}
	if err != nil {
		return err
	}
	w.newOne, err = locker.NewPreemptiveLockerFactory(w.provider)
	return err
}

// end closes everything and reports what is left over.
func (w *worker) end(idle int) {
	close(w.stopping)
	err := w.provider.(io.Closer).Close()
	w.running.Wait()
	_ = w.fence.Close()
	bye := oracle.Event{Kind: oracle.Bye}
	for range 100 {
		if bye.Count = max(0, runtime.NumGoroutine()-idle); bye.Count == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if bye.Count > 0 {
		stacks := make([]byte, 64<<10)
		bye.Text = string(stacks[:runtime.Stack(stacks, true)])
	}
	if err != nil {
		bye.Count++
		bye.Text += err.Error()
	}
	w.emit(bye)
}

// observe adds the provider's observations of its session to the history.
func (w *worker) observe(o locker.Observation) {
	switch o.Kind {
	case locker.ObservedSuspended:
		w.emit(oracle.Event{Kind: oracle.Suspended, Count: o.Kept})
	case locker.ObservedReconnected:
		w.emit(oracle.Event{Kind: oracle.Reconnected, Count: o.Kept, Lost: o.Lost})
	}
}

// emit adds an event to the history. Its time is that of the call.
func (w *worker) emit(e oracle.Event) {
	if e.At == 0 {
		e.At = oracle.Now()
	}
	e.Worker = w.name
	// Marshal cannot fail for an Event.
	line, _ := json.Marshal(e)
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := w.out.Write(append(line, '\n')); err != nil {
		// The driver has ended.
		os.Exit(1)
	}
}

// do executes a command of the driver. "burst N KEY" claims KEY N times concurrently, "hold KEY"
// claims it once and holds it for long, and "wait KEY" locks it once without announcing a claim.
func (w *worker) do(command string) {
	var n, key int64
	p, announce := plan{hold: time.Second}, true
	if _, err := fmt.Sscanf(command, "hold %d", &key); err == nil {
		n, p.hold = 1, 18*time.Second
	} else if _, err := fmt.Sscanf(command, "wait %d", &key); err == nil {
		n, announce = 1, false
	} else if _, err := fmt.Sscanf(command, "burst %d %d", &n, &key); err != nil {
		return
	}
	for i := range n {
		w.running.Add(1)
		go func() {
			defer w.running.Done()
			p := p
			p.react = time.Duration(i%5) * 100 * time.Millisecond
			w.direct(key, p, announce)
		}()
	}
}

// sweep proves that every key can be locked.
func (w *worker) sweep() {
	for i := range w.keys {
		w.running.Add(1)
		go func() {
			defer w.running.Done()
			w.direct(w.base+1+int64(i), plan{hold: 50 * time.Millisecond}, true)
		}()
	}
	w.running.Wait()
}

// plan determines what a claim does with its hold.
type plan struct {
	mode  locker.ClaimMode
	hold  time.Duration
	react time.Duration // after the notification
}

func (w *worker) client(r *rand.Rand) {
	defer w.running.Done()
	for {
		select {
		case <-w.stopping:
			return
		case <-time.After(time.Duration(r.ExpFloat64() * float64(400*time.Millisecond))):
		}
		// Low keys are claimed more often.
		key := w.base + 1 + int64(min(r.IntN(w.keys), r.IntN(w.keys)))
		p := plan{
			hold:  min(w.maxHold, time.Duration(r.ExpFloat64()*float64(w.maxHold)/3)),
			react: time.Duration(r.IntN(300)) * time.Millisecond,
		}
		// The hold is long enough to see the end of a silent network.
		if r.IntN(3) == 0 {
			p.hold = 10*time.Second + rand.N(5*time.Second)
		}
		switch n := r.IntN(100); {
		case n < 25:
			p.mode = locker.LetFinish
		case n < 40:
			p.mode = locker.SkipIfBusy
		}
		switch n := r.IntN(100); {
		// The claim ignores its notification and will be revoked.
		case n < 5:
			p.react = w.preempt + time.Second
			w.direct(key, p, true)
		case n < 65:
			w.direct(key, p, true)
		case n < 72:
			// A claim that is not announced has no mode.
			p.mode = locker.Preempt
			w.direct(key, p, false)
		default:
			w.viaDo(key, p)
		}
	}
}

// claim is one claim's part of the history.
type claim struct {
	*worker
	id    string
	key   int64
	how   string
	token int64
}

func (w *worker) claim(key int64, how string, mode locker.ClaimMode) *claim {
	c := &claim{worker: w, id: fmt.Sprintf("%s-%d", w.name, w.claims.Add(1)), key: key, how: how}
	e := oracle.Event{Kind: oracle.Attempt, How: how}
	switch mode {
	case locker.LetFinish:
		e.Mode = oracle.ModeFinish
	case locker.SkipIfBusy:
		e.Mode = oracle.ModeSkip
	}
	c.emit(e)
	return c
}

func (c *claim) emit(e oracle.Event) {
	e.Claim, e.Key = c.id, c.key
	c.worker.emit(e)
}

func (c *claim) ended(class string, err error) {
	e := oracle.Event{Kind: oracle.Ended, Class: class}
	if err != nil {
		e.Text = err.Error()
	}
	c.emit(e)
}

// classOf returns the class of the reason for which a wait or a hold ended.
func classOf(err error) string {
	switch {
	case err == nil:
		return oracle.ClassReleased
	case errors.Is(err, locker.ErrLockPreempted):
		return oracle.ClassDisplaced
	case errors.Is(err, locker.ErrLockBusy):
		return oracle.ClassBusy
	case errors.Is(err, locker.ErrLockTimeout):
		return oracle.ClassTimeout
	case errors.Is(err, locker.ErrLockLost):
		return oracle.ClassLost
	case errors.Is(err, locker.ErrProviderClosed):
		return oracle.ClassClosed
	case errors.Is(err, locker.ErrMaxLockDuration):
		return oracle.ClassMax
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return oracle.ClassContext
	}
	return oracle.ClassFailed
}

// direct makes a claim through the provider.
func (w *worker) direct(key int64, p plan, announce bool) {
	how := oracle.HowDirect
	if !announce {
		how = oracle.HowSilent
	}
	c := w.claim(key, how, p.mode)
	ctx := locker.ContextWithMode(context.Background(), p.mode)
	bounded, cancel := context.WithTimeout(context.Background(), w.notify)
	defer cancel()
	number, err := w.provider.LockKey(bounded, repo, uint(key))
	if err != nil {
		c.ended(classOf(err), err)
		return
	}
	l, err := w.provider.New(bounded, number, c.id)
	if err != nil {
		c.ended(classOf(err), err)
		return
	}
	if announce && p.mode != locker.SkipIfBusy {
		bounded, cancel := context.WithTimeout(ctx, w.notify)
		defer cancel()
		c.emit(oracle.Event{Kind: oracle.Announcing})
		if err := l.Notify(bounded); err != nil {
			c.ended(classOf(err), err)
			return
		}
		c.emit(oracle.Event{Kind: oracle.Announced})
	}
	c.emit(oracle.Event{Kind: oracle.Waiting})
	ch, err := l.Lock(ctx)
	at := oracle.Now()
	if err != nil {
		c.ended(classOf(err), err)
		return
	}
	c.token = l.(interface{ Token() int64 }).Token()
	c.emit(oracle.Event{Kind: oracle.Locked, At: at, Token: c.token})
	class := c.hold(l, ch, p)
	c.emit(oracle.Event{Kind: oracle.Releasing})
	err = l.Unlock(context.Background())
	if class == "" {
		class = classOf(err)
	}
	c.ended(class, err)
}

// hold writes until the time has passed or the holder is notified. It returns the class of the
// notification.
func (c *claim) hold(l locker.PreemptableLock, ch <-chan locker.NotificationPayload, p plan) string {
	c.begin()
	over := time.After(p.hold)
	tick := time.NewTicker(150 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-over:
			return ""
		case <-tick.C:
			c.write(true)
		case n, ok := <-ch:
			class := oracle.ClassLost
			text := n.Message
			if cause, has := l.(interface{ Cause() error }); has && cause.Cause() != nil {
				class, text = classOf(cause.Cause()), cause.Cause().Error()
			}
			c.emit(oracle.Event{Kind: oracle.Notified, Class: class, Text: text})
			if !ok {
				c.emit(oracle.Event{Kind: oracle.Over})
				return class
			}
			// The worker cleans up.
			select {
			case <-ch:
				c.emit(oracle.Event{Kind: oracle.Over})
				return class
			case <-time.After(p.react):
			}
			if p.react < c.preempt {
				c.write(false)
			}
			return class
		}
	}
}

// begin records the moment from which the worker relies on being alone. Its first write makes the
// token known to the resource.
func (c *claim) begin() {
	c.emit(oracle.Event{Kind: oracle.Begin, Token: c.token})
	c.write(true)
}

func (c *claim) write(belief bool) {
	start := oracle.Now()
	ok, err := c.fencedWrite()
	// This worker was frozen meanwhile.
	if errors.Is(err, context.DeadlineExceeded) {
		ok, err = c.fencedWrite()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "worker: fenced resource:", err)
		// Without the resource there is nothing to judge.
		os.Exit(3)
	}
	c.emit(oracle.Event{Kind: oracle.Write, Start: start, Token: c.token, OK: ok, Belief: belief})
}

// fencedWrite reports whether the resource has accepted a write.
func (c *claim) fencedWrite() (ok bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err = c.fence.QueryRowContext(ctx, "SELECT fenced_write($1, $2, $3)", c.key, c.token, c.id).Scan(&ok)
	return ok, err
}

// viaDo makes a claim through PreemptiveLocker.Do.
func (w *worker) viaDo(key int64, p plan) {
	c := w.claim(key, oracle.HowDo, p.mode)
	l := w.newOne(repo, uint(key), c.id).Mode(p.mode)
	err := l.Do(context.Background(), func(ctx context.Context) error {
		at := oracle.Now()
		c.token = l.Token()
		c.emit(oracle.Event{Kind: oracle.Locked, At: at, Token: c.token})
		c.begin()
		defer func() { c.emit(oracle.Event{Kind: oracle.Releasing}) }()
		over := time.After(p.hold)
		tick := time.NewTicker(150 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-over:
				return nil
			case <-tick.C:
				c.write(true)
			case <-ctx.Done():
				cause := context.Cause(ctx)
				c.emit(oracle.Event{Kind: oracle.Notified, Class: classOf(cause), Text: cause.Error()})
				if !errors.Is(cause, locker.ErrLockLost) {
					time.Sleep(p.react)
				}
				return nil
			}
		}
	})
	c.ended(classOf(err), err)
}
