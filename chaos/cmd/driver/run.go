package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	_ "github.com/lib/pq"

	"github.com/preemptable/locker/chaos/fault"
	"github.com/preemptable/locker/chaos/oracle"
	"github.com/preemptable/locker/internal/pgserver"
)

type config struct {
	seed                   uint64
	duration               time.Duration
	sessions               []time.Duration // timeouts of the workers' sessions, alternating
	workers, clients, keys int
	faults                 []string // only these, or empty for all of them, alone and mixed
	rounds                 int      // of each fault, or 0 for as many as fit into 40 s
	provider               string   // empty: the real one
	binary                 string   // of the worker, or empty to build it
	history                string
	progress               int           // of the workers' providers: how many holds in a row claims may end, or 0 for any number
	spared                 time.Duration // how long the next hold may finish
	verbose                bool
	brief                  time.Duration // if not 0, one round of each fault, no longer than this, and no mixture
	settle                 time.Duration // if not 0, how long the run continues after each fault
	late                   time.Duration // how late workers may notice events, or 0 for the default
	out                    io.Writer     // for messages
}

// wants reports whether a fault was selected.
func (c config) wants(name string) bool {
	return len(c.faults) == 0 || slices.ContainsFunc(c.faults, func(word string) bool {
		return strings.Contains(strings.ToLower(name), strings.ToLower(strings.TrimSpace(word)))
	})
}

// lockTimeout returns the lock timeout of the workers. It leaves time to take over from a dead
// session.
func lockTimeout(session time.Duration) time.Duration { return session + 7*time.Second }

// phase is a part of the run that belongs to one fault.
type phase struct {
	Name     string
	Runs     int
	From, To int64
}

// recording contains everything that was recorded of a run.
type recording struct {
	Seed    uint64
	Took    time.Duration
	Session time.Duration // the longest timeout of the workers' sessions
	Offset  int64         // from the history's clock to the servers' clock, in nanoseconds
	Late    time.Duration
	Broken  bool // whether the provider is deliberately broken

	Progress int // how many holds in a row claims may end, or 0 for any number
	Spared   time.Duration

	Phases []phase
	Left   []string // what was left over, and faults that could not be injected
	Rows   []oracle.Row
	Events []oracle.Event
}

// driver is one run.
type driver struct {
	config
	recording
	rand   *rand.Rand
	begun  time.Time
	dir    string
	skewed string
	fence  *pgserver.Server

	mu sync.Mutex // guards Events while workers run
}

// run runs one seed.
func run(ctx context.Context, c config) (report, error) {
	d := &driver{config: c, rand: rand.New(rand.NewPCG(c.seed, 0)), begun: time.Now()}
	d.Seed, d.Session, d.Late, d.Broken = c.seed, slices.Max(c.sessions), c.late, c.provider != ""
	d.Progress, d.Spared = c.progress, c.spared
	d.Offset = d.begun.UnixNano() - oracle.Now()
	d.say("seed %d", c.seed)
	err := d.prepare(ctx)
	if err == nil {
		err = d.play(ctx)
	}
	d.Took = time.Since(d.begun)
	if err == nil {
		d.Rows, err = d.rows()
	}
	err = errors.Join(err, d.close())
	if err != nil {
		return report{}, err
	}
	return d.judge(d.say), nil
}

// rejudge judges a recorded run.
func rejudge(name string) (report, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return report{}, err
	}
	var r recording
	if err := json.Unmarshal(text, &r); err != nil {
		return report{}, fmt.Errorf("%s: %w", name, err)
	}
	return r.judge(func(format string, args ...any) { fmt.Printf(format+"\n", args...) }), nil
}

func (d *driver) say(format string, args ...any) {
	if d.out != nil {
		fmt.Fprintf(d.out, "%7.1fs  %s\n", time.Since(d.begun).Seconds(), fmt.Sprintf(format, args...))
	}
}

func (d *driver) add(e oracle.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.Events = append(d.Events, e)
}

func (d *driver) prepare(ctx context.Context) (err error) {
	// The server of the fenced resource is not a target of faults.
	if d.fence, err = pgserver.Start(ctx, pgserver.Options{Config: map[string]string{"fsync": "off", "max_connections": "200"}}); err != nil {
		return err
	}
	if err = d.fence.Exec(ctx, fenceSchema); err != nil {
		return err
	}
	// The folder is in the server's, because that is removed even if this process is killed.
	if d.dir, err = os.MkdirTemp(filepath.Dir(d.fence.DataDir()), "workers-"); err != nil {
		return err
	}
	if d.binary == "" {
		if d.binary, err = build(ctx, d.dir); err != nil {
			return err
		}
	}
	for _, f := range fault.Faults() {
		if strings.Contains(f.Name, "wall clock") && d.wants(f.Name) && d.brief == 0 {
			d.say("building a worker with a wrong clock")
			if d.skewed, err = buildSkewed(ctx, d.dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// fenceSchema creates the fenced resource. It rejects a token that is lower than the highest that
// it has seen, and records every write.
const fenceSchema = `
CREATE TABLE fenced (key bigint PRIMARY KEY, token bigint NOT NULL);
CREATE TABLE writes (seq bigserial PRIMARY KEY, key bigint NOT NULL, token bigint NOT NULL, claim text NOT NULL, accepted boolean NOT NULL);
CREATE FUNCTION fenced_write(k bigint, t bigint, c text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE ok boolean;
BEGIN
	INSERT INTO fenced VALUES (k, t) ON CONFLICT (key) DO UPDATE SET token = excluded.token WHERE fenced.token <= excluded.token;
	ok := FOUND;
	INSERT INTO writes (key, token, claim, accepted) VALUES (k, t, c, ok);
	RETURN ok;
END $$;`

func (d *driver) rows() ([]oracle.Row, error) {
	db, err := sql.Open("postgres", d.fence.URI("postgres"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = db.Close() }()
	found, err := db.Query("SELECT seq, key, token, claim, accepted FROM writes")
	if err != nil {
		return nil, err
	}
	defer func() { _ = found.Close() }()
	var rows []oracle.Row
	for found.Next() {
		var r oracle.Row
		if err := found.Scan(&r.Seq, &r.Key, &r.Token, &r.Claim, &r.Accepted); err != nil {
			return nil, err
		}
		rows = append(rows, r)
	}
	return rows, found.Err()
}

func (d *driver) close() error {
	var errs []error
	if d.fence != nil {
		errs = append(errs, d.fence.Close())
	}
	if d.history != "" {
		errs = append(errs, d.writeHistory())
	}
	return errors.Join(errs...)
}

func (d *driver) writeHistory() error {
	text, err := json.Marshal(d.recording)
	if err != nil {
		return err
	}
	return os.WriteFile(d.history, text, 0o644)
}

// build builds the worker.
func build(ctx context.Context, dir string, flags ...string) (string, error) {
	binary := filepath.Join(dir, fmt.Sprintf("worker%d", len(flags)))
	if raceDetector {
		flags = append(flags, "-race")
	}
	args := append(append([]string{"build", "-o", binary}, flags...), "github.com/preemptable/locker/chaos/cmd/worker")
	if out, err := exec.CommandContext(ctx, "go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the worker: %w\n%s", err, out)
	}
	return binary, nil
}

// buildSkewed builds a worker whose time.Now is wrong, by replacing that function in the standard
// library. A Go program does not ask the C library for the time, so tools that replace functions
// there have no effect on it. The monotonic part of a time stays correct, as on a machine whose
// clock is set.
func buildSkewed(ctx context.Context, dir string) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", err
	}
	name := filepath.Join(strings.TrimSpace(string(out)), "src", "time", "time.go")
	source, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	const original = "\nfunc Now() Time {\n"
	if strings.Count(string(source), original) != 1 {
		return "", errors.New("build the worker with a wrong clock: this Go's time.Now looks different")
	}
	text := strings.Replace(string(source), original, "\nfunc trueNow() Time {\n", 1) + `
// Now is an hour ahead, then an hour behind, and changes its mind every 7 s.
func Now() Time {
	t := trueNow()
	hour := int64(3600)
	if t.wall&hasMonotonic == 0 {
		t.ext += hour
		return t
	}
	if t.ext/7e9%2 == 1 {
		hour = -hour
	}
	t.wall += uint64(hour) << nsecShift
	return t
}
`
	replacement := filepath.Join(dir, "time.go")
	// Marshal cannot fail for this value.
	overlay, _ := json.Marshal(map[string]any{"Replace": map[string]string{name: replacement}})
	if err := errors.Join(os.WriteFile(replacement, []byte(text), 0o600), os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o600)); err != nil {
		return "", err
	}
	return build(ctx, dir, "-overlay", filepath.Join(dir, "overlay.json"))
}

// args returns the workers' arguments.
func (d *driver) args() []string {
	args := []string{"-clients", fmt.Sprint(d.clients), "-lock-timeout", fmt.Sprint(lockTimeout(d.Session)),
		"-progress", fmt.Sprint(d.config.progress), "-spared", fmt.Sprint(d.spared)}
	if d.provider != "" {
		args = append([]string{"-provider", d.provider}, args...)
	}
	if d.verbose {
		args = append(args, "-v")
	}
	return args
}

// inWorld runs a world from the start of its workers to their end.
func (d *driver) inWorld(ctx context.Context, w *fault.World, play func() error) error {
	w.FenceURI, w.Binary, w.Skewed, w.Args, w.Sessions, w.Record = d.fence.URI("postgres"), d.binary, d.skewed, d.args(), d.sessions, d.add
	var err error
	for range d.workers {
		err = errors.Join(err, w.Start(d.rand.Uint64()))
	}
	if err == nil {
		sleep(ctx, 3*time.Second)
		err = play()
	}
	d.say("the end: nothing may be left")
	d.Left = append(d.Left, w.End(context.WithoutCancel(ctx))...)
	if err := w.Err(); err != nil {
		d.Left = append(d.Left, err.Error())
	}
	return err
}

func sleep(ctx context.Context, t time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(t):
	}
}

// play runs all faults.
func (d *driver) play(ctx context.Context) error {
	var losses []failover
	for _, f := range failovers {
		if d.wants(f.name) {
			losses = append(losses, f)
		}
	}
	rest := time.Duration(len(losses)) * 45 * time.Second
	deadline := d.begun.Add(d.duration - rest - 20*time.Second)

	server, err := fault.NewServer(ctx, map[string]string{"max_connections": "40", "max_locks_per_transaction": "20"})
	if err != nil {
		return err
	}
	d.say("PostgreSQL %s, %d workers with %d claims at a time, %d keys", server.Version(), d.workers, d.clients, d.keys)
	world := &fault.World{Server: server, Keys: d.keys}
	err = d.inWorld(ctx, world, func() error {
		var faults []fault.Fault
		for _, f := range fault.Faults() {
			if d.wants(f.Name) {
				faults = append(faults, f)
			}
		}
		d.rand.Shuffle(len(faults), func(a, b int) { faults[a], faults[b] = faults[b], faults[a] })
		half := deadline
		if len(d.faults) == 0 {
			half = d.begun.Add(deadline.Sub(d.begun) / 2)
		}
		for _, f := range faults {
			if ctx.Err() != nil || time.Now().After(half) {
				break
			}
			d.single(ctx, world, f)
		}
		for d.brief == 0 && d.wants("mixed") && ctx.Err() == nil && time.Now().Before(deadline.Add(-20*time.Second)) {
			d.mixed(ctx, world)
		}
		return nil
	})
	err = errors.Join(err, server.Close())
	for i, f := range losses {
		if err == nil && ctx.Err() == nil {
			err = d.failover(ctx, int64(1000*(i+1)), f)
		}
	}
	return err
}

// single runs one fault alone, several times if it is short.
func (d *driver) single(ctx context.Context, w *fault.World, f fault.Fault) {
	rounds := 1
	if cycle := f.Hold + f.Settle; d.brief == 0 && cycle > 0 && !f.Alone {
		rounds = max(1, int(40*time.Second/cycle))
	}
	if d.rounds > 0 {
		rounds = d.rounds
	}
	if d.brief != 0 {
		f.Hold = min(f.Hold, d.brief)
		f.Settle = min(f.Settle, 6*time.Second)
	}
	if d.settle != 0 {
		f.Settle = d.settle
	}
	p := phase{Name: f.Name, From: oracle.Now()}
	for range rounds {
		if ctx.Err() != nil {
			break
		}
		victims := d.victims(w, f, nil)
		d.say("%s: %s", f.Name, strings.Join(w.Names(victims), " "))
		if err := f.Run(ctx, w, victims, d.rand); err != nil {
			d.say("%s: %v", f.Name, err)
			d.Left = append(d.Left, fmt.Sprintf("%s could not be done: %v", f.Name, err))
		}
		p.Runs++
		sleep(ctx, f.Settle)
	}
	p.To = oracle.Now()
	d.Phases = append(d.Phases, p)
}

// victims returns as many workers as the fault hits, without those that are taken.
func (d *driver) victims(w *fault.World, f fault.Fault, taken []*fault.Worker) []*fault.Worker {
	all := w.Workers()
	if f.Victims == fault.All {
		return all
	}
	d.rand.Shuffle(len(all), func(a, b int) { all[a], all[b] = all[b], all[a] })
	all = slices.DeleteFunc(all, func(v *fault.Worker) bool { return slices.Contains(taken, v) })
	return all[:min(len(all), f.Victims)]
}

// mixed runs two or three faults concurrently.
func (d *driver) mixed(ctx context.Context, w *fault.World) {
	var faults []fault.Fault
	for _, f := range fault.Faults() {
		if !f.Alone {
			faults = append(faults, f)
		}
	}
	d.rand.Shuffle(len(faults), func(a, b int) { faults[a], faults[b] = faults[b], faults[a] })
	p := phase{Name: "mixed", From: oracle.Now()}
	var taken []*fault.Worker
	var running sync.WaitGroup
	for _, f := range faults[:2+d.rand.IntN(2)] {
		f.Hold = min(f.Hold, 32*time.Second)
		victims := d.victims(w, f, taken)
		if f.Victims != fault.All {
			taken = append(taken, victims...)
		}
		wait := time.Duration(d.rand.IntN(4000)) * time.Millisecond
		r := rand.New(rand.NewPCG(d.rand.Uint64(), 0))
		p.Runs++
		running.Add(1)
		go func() {
			defer running.Done()
			sleep(ctx, wait)
			d.say("mixed: %s: %s", f.Name, strings.Join(w.Names(victims), " "))
			if err := f.Run(ctx, w, victims, r); err != nil {
				d.say("mixed: %s: no effect: %v", f.Name, err)
			}
		}()
	}
	running.Wait()
	sleep(ctx, 5*time.Second)
	p.To = oracle.Now()
	d.Phases = append(d.Phases, p)
}
