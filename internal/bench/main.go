// Command bench measures the library against its floor, the equivalent raw PostgreSQL operations,
// on a separate server with stock settings, and prints one table. It uses only the library's public
// API.
//
//	go run ./internal/bench            # the table, which is also written to docs/bench/results.{md,json,svg}
//	go run ./internal/bench -quick     # a tenth of everything, nothing written
//	go run ./internal/bench -profile   # where the time of one cycle goes, written to docs/bench/profile.md
//	go run ./internal/bench -plot      # results.md, results.svg, and the figures in docs/capacity.md, from results.json
//
// With -soak=1000000, or BENCH_SOAK=1000000 in the environment, it runs the whole soak. With
// -only=cycle,held it runs some sections. The sections are cycle, events, throughput, held,
// connections, restart, cut, fake and soak.
//
// The library and the floor take turns in one run. A figure is the median of its rounds' medians,
// followed by the smallest and the largest of them, so that a noisy machine shows.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/preemptable/locker/internal/pgserver"
)

// bench is one run.
type bench struct {
	ctx    context.Context
	server *pgserver.Instance
	scale  float64 // of counts and durations: 1 for a whole run
	soak   int     // number of cycles
	result result
}

const defaultOut = "docs/bench/results"

func main() {
	quick := flag.Bool("quick", false, "a tenth of everything; writes no file unless -out is given")
	only := flag.String("only", "", "comma-separated sections to run; writes no file unless -out is given")
	soak := flag.Int("soak", 20_000, "cycles of the soak; the environment variable BENCH_SOAK says it too")
	profile := flag.Bool("profile", false, "show where the time of one cycle goes")
	plot := flag.Bool("plot", false, "write the table and the plot from the result file again, and stop")
	out := flag.String("out", defaultOut, "result files, without the ending; empty: none")
	if n, err := strconv.Atoi(os.Getenv("BENCH_SOAK")); err == nil {
		_ = flag.Set("soak", strconv.Itoa(n))
	}
	flag.Parse()

	given := map[string]bool{}
	flag.Visit(func(f *flag.Flag) { given[f.Name] = true })
	switch {
	case given["out"]:
	// The profile has another default.
	case *profile:
		*out = "docs/bench/profile"
	}
	if (*quick || *only != "") && !given["out"] {
		*out = ""
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	b := &bench{ctx: ctx, scale: 1, soak: *soak}
	if *quick {
		b.scale = 0.1
	}
	err := caught(func() {
		switch {
		case *plot:
			plotFile(*out)
		case *profile:
			b.profile(*out)
		default:
			b.run(*only, *out)
		}
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// failure is the value with which check panics.
type failure struct{ error }

// check ends the function that caught has called. It may be called only on the goroutine of caught.
// The server ends with the process in any case.
func check(err error) {
	if err != nil {
		panic(failure{err})
	}
}

func caught(f func()) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case failure:
			err = r.error
		default:
			panic(r)
		}
	}()
	f()
	return nil
}

func (b *bench) run(only, out string) {
	sections := []struct {
		name string
		run  func()
	}{
		{"cycle", b.cycle}, {"events", b.events}, {"throughput", b.throughput}, {"held", b.holding},
		{"connections", b.connected}, {"restart", b.restarts}, {"cut", b.cut}, {"fake", b.fake}, {"soak", b.soaked},
	}
	server, err := pgserver.Shared(b.ctx)
	check(err)
	b.server = server
	defer func() { _ = server.Close() }()
	start := time.Now()
	b.describe()
	var failed error
	for _, s := range sections {
		if only != "" && !strings.Contains(","+only+",", ","+s.name+",") {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %-11s (%.0f s)\n", s.name, time.Since(start).Seconds())
		runtime.GC()
		if err := caught(s.run); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", s.name, err))
		}
	}
	b.result.Seconds = int(time.Since(start).Seconds())
	fmt.Print(b.result.table())
	// An incomplete result must not replace a file.
	check(failed)
	if out != "" {
		b.result.write(out)
		plotFile(out)
		fmt.Fprintf(os.Stderr, "bench: written to %s.md, .json and .svg\n", out)
	}
}

// describe records the machine and the software of the run.
func (b *bench) describe() {
	b.result.When = time.Now().UTC().Format("2006-01-02 15:04 UTC")
	b.result.Go = runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH
	b.result.CPUs = runtime.NumCPU()
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				b.result.Commit = s.Value[:min(len(s.Value), 12)]
			}
		}
	}
	uri, drop := b.database()
	defer drop()
	db := openDB(uri, 1)
	defer func() { _ = db.Close() }()
	check(db.QueryRowContext(b.ctx, `SELECT current_setting('server_version'),
		format('fsync=%s, synchronous_commit=%s, max_connections=%s, max_locks_per_transaction=%s, shared_buffers=%s',
			current_setting('fsync'), current_setting('synchronous_commit'), current_setting('max_connections'),
			current_setting('max_locks_per_transaction'), current_setting('shared_buffers'))`).
		Scan(&b.result.Postgres, &b.result.Settings))
	on, off := newUpdate(uri, "on"), newUpdate(uri, "off")
	defer on.close()
	defer off.close()
	c := newComparison()
	for range 5 {
		c.round(b.count(100), 1, func() { check(on.run()) }, func() { check(off.run()) })
	}
	b.result.FlushMS = ms(c.ours.median() - c.floor.median())
}

// count scales a number of repetitions.
func (b *bench) count(n int) int { return max(3, int(float64(n)*b.scale)) }

// span scales a duration.
func (b *bench) span(d time.Duration) time.Duration {
	return max(100*time.Millisecond, time.Duration(float64(d)*b.scale))
}

func (b *bench) database() (uri string, drop func()) {
	uri, drop, err := b.server.NewDatabase(b.ctx)
	check(err)
	return uri, drop
}
