// Command peers compares the library with the alternatives of its users: the same work on each,
// alternating, in one run, on throwaway servers that it starts itself.
//
//	go run .            # the whole run, written to results.{json,md,svg} and docs/peers.md
//	go run . -quick     # a few samples of everything, shorter timeouts, nothing written
//	go run . -plot      # results.md, results.svg and docs/peers.md from results.json again
//
// With -only=speed,held,faults it runs some sections, and with -peers=locker,etcd some peers.
// LOCKER_PEERS_REDIS_SERVER and LOCKER_PEERS_ETCD name the programs if they are not in PATH. The
// programs of PostgreSQL are found by internal/pgserver. A peer without its server is left out, and
// a line reports that.
//
// results.json keeps the last two runs, and each table shows both.
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
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// bench is one run.
type bench struct {
	ctx    context.Context
	quick  bool
	ttl    time.Duration // of all leases, and the session timeout
	cut    time.Duration // how long the network is cut
	held   int           // locks of the process that holds many
	holds  int           // locks of a process that meets a fault
	result run
	peers  []*subject
}

// subject is a peer that is measured, and its result.
type subject struct {
	*peer
	result *peerResult
}

func main() {
	if text := os.Getenv(envChild); text != "" {
		os.Exit(runChild(text))
	}
	quick := flag.Bool("quick", false, "a few samples, shorter timeouts; writes no file unless -out is given")
	only := flag.String("only", "", "comma-separated sections to run: speed, held, faults; writes no file unless -out is given")
	names := flag.String("peers", "", "comma-separated IDs of the peers to run, such as locker,etcd; writes no file unless -out is given")
	plot := flag.Bool("plot", false, "write tables and plot from the result file and stop")
	out := flag.String("out", defaultOut, "result files, without the ending; empty: none")
	flag.Parse()
	outGiven := false
	flag.Visit(func(f *flag.Flag) { outGiven = outGiven || f.Name == "out" })
	if (*quick || *only != "" || *names != "") && !outGiven {
		*out = ""
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := func() error {
		if *plot {
			return render(*out)
		}
		b := &bench{ctx: ctx, quick: *quick, ttl: 10 * time.Second, cut: 5 * time.Second, held: 1000, holds: 100}
		if b.quick {
			b.ttl, b.cut, b.held, b.holds = 4*time.Second, time.Second, 100, 20
		}
		return b.run(*only, *names, *out)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}

func (b *bench) run(only, names, out string) error {
	start := time.Now()
	b.describe(names)
	var failed error
	section := func(name string, run func() error) {
		if !chosen(only, name) {
			return
		}
		fmt.Fprintf(os.Stderr, "peers: %-7s (%.0f s)\n", name, time.Since(start).Seconds())
		if err := run(); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", name, err))
		}
	}
	section("speed", b.speed)
	if chosen(only, "held") || chosen(only, "faults") {
		stores, closeStores, err := b.stores(faultConnections)
		if err != nil {
			return err
		}
		defer closeStores()
		section("held", func() error { return b.hold(stores) })
		section("faults", func() error { return b.faults(stores) })
	}
	b.result.Seconds = int(time.Since(start).Seconds())
	r := results{Runs: []run{b.result}}
	fmt.Print(r.markdown())
	// An incomplete result must not replace a file.
	if failed != nil || out == "" {
		return failed
	}
	if err := keepRun(out, b.result); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "peers: written to %s.md, .json and .svg (%d s)\n", out, b.result.Seconds)
	return render(out)
}

// chosen reports whether a list, separated by commas, contains a name. An empty list contains all.
func chosen(list, name string) bool {
	return list == "" || strings.Contains(","+list+",", ","+name+",")
}

// describe records the peers, the machine and the software of the run.
func (b *bench) describe(names string) {
	b.result = run{
		When: time.Now().UTC().Format("2006-01-02 15:04 UTC"), Go: runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH,
		CPUs: runtime.NumCPU(), TTL: b.ttl.Seconds(), Cut: b.cut.Seconds(), Stores: map[storeKind]storeResult{},
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				b.result.Commit = s.Value[:min(len(s.Value), 12)]
			}
		}
	}
	for _, p := range peers() {
		if !chosen(names, p.ID) {
			continue
		}
		r := &peerResult{
			ID: p.ID, Name: p.Name, Store: p.store, Versions: p.versions(), Client: p.Client, Refresh: p.Refresh,
			Durable: p.Durable, LeftOut: p.LeftOut,
		}
		if p.Expiry != "" {
			r.Expiry = strings.ReplaceAll(p.Expiry, "%s", b.ttl.String())
		}
		b.result.Peers = append(b.result.Peers, r)
		if p.LeftOut != "" {
			fmt.Fprintf(os.Stderr, "peers: %s is left out: %s\n", p.Name, p.LeftOut)
			continue
		}
		b.peers = append(b.peers, &subject{p, r})
	}
}

// count scales a number of repetitions.
func (b *bench) count(n int) int {
	if b.quick {
		return max(2, n/8)
	}
	return n
}

// stores starts the server of every peer. A peer without one is left out from then on.
func (b *bench) stores(connections int) (map[storeKind]store, func(), error) {
	all := map[storeKind]store{}
	closeAll := func() {
		for _, s := range all {
			if err := s.close(); err != nil {
				fmt.Fprintln(os.Stderr, "peers:", err)
			}
		}
	}
	missing := map[storeKind]error{}
	for _, kind := range storeKinds {
		s, err := startStore(b.ctx, kind, connections)
		if errors.Is(err, errNoProgram) {
			missing[kind] = err
			continue
		}
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("%s: %w", kind, err)
		}
		all[kind] = s
		version, settings := s.describe()
		if _, known := b.result.Stores[kind]; !known {
			b.result.Stores[kind] = storeResult{version, settings}
		}
	}
	if all[postgres] == nil {
		closeAll()
		return nil, nil, missing[postgres]
	}
	var there []*subject
	for _, p := range b.peers {
		if err := missing[p.store]; err != nil {
			p.result.LeftOut = err.Error()
			fmt.Fprintf(os.Stderr, "peers: %s is left out: %v\n", p.Name, err)
			continue
		}
		there = append(there, p)
	}
	b.peers = there
	return all, closeAll, nil
}

// flush measures the additional time of a commit that waits for the disk.
func (b *bench) flush(uri string) error {
	conn, err := pgx.Connect(b.ctx, uri)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if _, err := conn.Exec(b.ctx, "CREATE TABLE peers_flush (n bigint) WITH (fillfactor = 50); INSERT INTO peers_flush VALUES (0)"); err != nil {
		return err
	}
	with, without := rounds{}, rounds{}
	for range 5 {
		with.begin()
		without.begin()
		for range b.count(80) {
			for _, side := range []struct {
				to   rounds
				text string
			}{
				{with, "UPDATE peers_flush SET n = n + 1 RETURNING set_config('synchronous_commit', 'on', true)"},
				{without, "UPDATE peers_flush SET n = n + 1 RETURNING set_config('synchronous_commit', 'off', true)"},
			} {
				start := time.Now()
				if _, err := conn.Exec(b.ctx, side.text); err != nil {
					return err
				}
				side.to.add(time.Since(start))
			}
		}
	}
	b.result.FlushMS = with.figure().Value - without.figure().Value
	return nil
}
