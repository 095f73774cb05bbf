package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/preemptable/locker"
	"github.com/preemptable/locker/internal/pgserver"
	"github.com/preemptable/locker/internal/table"
)

// profile measures where the time of one cycle goes, from outside of the library:
//
//   - The server's own time is taken from its log, which has the time of binding and executing each
//     statement.
//   - A round trip is the time of a prepared SELECT 1, less the server's time for it.
//   - A commit is the time of a one-row UPDATE that does not wait for the disk, less the round trip
//     and the server's time for it.
//   - A flush is the time of a one-row UPDATE that waits, less that of one that does not. The number
//     of flushes is taken from pg_stat_wal.
//   - The rest is the time of the library and the scheduler.
//
// The times are measured first. The server writes the log in a second pass, because that costs
// time.
func (b *bench) profile(out string) {
	server, err := pgserver.Start(b.ctx, pgserver.Options{})
	check(err)
	defer func() { _ = server.Close() }()
	uri := must(server.CreateDatabase(b.ctx, "profile"))

	p := newProvider(uri, locker.WithPreemptionTimeout(time.Millisecond))
	defer func() { _ = p.Close() }()
	f := newFactory(p)
	raw := newRawPair(uri)
	one := prepare(uri, "SELECT 1")
	on, off := newUpdate(uri, "on"), newUpdate(uri, "off")
	defer func() { raw.close(); one.close(); on.close(); off.close() }()
	sides := []func() error{
		func() error { return cycle(b.ctx, f, 1) },
		func() error { return raw.run(42) },
		func() error { return one.run() },
		func() error { return on.run() },
		func() error { return off.run() },
	}
	var times [5]rounds
	n := b.count(200)
	for i := range 11 {
		for s := range sides {
			// The first round is for warming up.
			if i == 1 {
				times[s] = nil
			}
			times[s] = append(times[s], nil)
		}
		for range n {
			for s, side := range sides {
				times[s].add(timed(func() { check(side()) }))
			}
		}
	}
	// syncs is how often the server waits for the disk. Its WAL writer adds a few flushes per
	// second.
	syncs := b.flushes(uri, func() int {
		const many = 1000
		for range many {
			check(cycle(b.ctx, f, 1))
		}
		return many
	})

	log := func(run func()) []logged {
		before := len(server.Logs())
		run()
		return parseLog(server.Logs()[before:])
	}
	check(server.Set(b.ctx, "log_parameter_max_length", "0"))
	check(server.Set(b.ctx, "log_min_duration_statement", "0"))
	time.Sleep(500 * time.Millisecond)
	// Each backend reads the settings before its next statement.
	for _, side := range sides {
		check(side())
	}
	all := make([][]logged, len(sides))
	for s, side := range sides {
		all[s] = log(func() {
			for range n {
				check(side())
			}
		})
	}
	us := func(d time.Duration) float64 { return float64(d) / 1e3 }
	total := func(statements []logged) (sum float64) {
		for _, l := range statements {
			sum += l.perRun(n) * l.median
		}
		return sum
	}
	selectWork, updateWork := total(all[2]), total(all[4])
	trip := us(times[2].median()) - selectWork
	commit := max(0, us(times[4].median())-updateWork-trip)
	flush := max(0, us(times[3].median())-us(times[4].median()))

	var b2 strings.Builder
	lines := [][]string{{"", "Lock + Release", "share", "raw pair", "share"}, {"---", "---", "---", "---", "---"}}
	columns := [][]part{
		parts(us(times[0].median()), all[0], n, trip, commit, flush, syncs),
		parts(us(times[1].median()), all[1], n, trip, commit, flush, 0),
	}
	for i := range max(len(columns[0]), len(columns[1])) {
		a, r := columns[0][i], part{}
		line := []string{a.name, table.Number(a.us) + " µs", percent(a.us, us(times[0].median())), "–", "–"}
		for _, c := range columns[1] {
			if c.key == a.key && a.key != "" {
				r = c
			}
		}
		if r.key != "" {
			line[3], line[4] = table.Number(r.us)+" µs", percent(r.us, us(times[1].median()))
		}
		lines = append(lines, line)
	}
	version := server.Version()
	fmt.Fprintf(&b2, "# Where the time of one cycle goes\n\n%s, PostgreSQL %s, stock settings. Medians of %d rounds of %d.\n\n%s\n",
		time.Now().UTC().Format("2006-01-02 15:04 UTC"), version, len(times[0]), n, table.Align(lines))

	// This is the cost of the check of rows that goes with a heartbeat, with many locks held.
	locks := make([]*locker.PreemptiveLocker, 10_000)
	check(each(len(locks), func(i int) error {
		locks[i-1] = f("org/repo", uint(i), "benchmark")
		_, err := locks[i-1].Lock(b.ctx)
		return err
	}))
	check(server.Exec(b.ctx, "SELECT 1"))
	beats := log(func() { time.Sleep(10 * time.Second) })
	var beat logged
	for _, l := range beats {
		if l.median > beat.median {
			beat = l
		}
	}
	check(server.Set(b.ctx, "log_min_duration_statement", "-1"))
	fmt.Fprintf(&b2, "With 10,000 locks held, the check of some of their rows takes the server %s ms, every 3 s.\n", table.Number(beat.median/1e3))
	fmt.Print(b2.String())
	if out != "" {
		writeFile(out+".md", b2.String())
		fmt.Fprintf(os.Stderr, "bench: written to %s.md\n", out)
	}
}

func percent(part, whole float64) string { return fmt.Sprintf("%.0f %%", 100*part/whole) }

// part is a line of the profile. Lines of the two columns with the same key are shown in one row.
type part struct {
	key, name string
	us        float64
}

func parts(whole float64, statements []logged, n int, trip, commit, flush, syncs float64) []part {
	var list []part
	var trips, writes, work float64
	for _, l := range statements {
		k := l.perRun(n)
		// Such a rare statement belongs to a heartbeat.
		if k < 0.1 {
			continue
		}
		trips += k
		if l.writes() {
			writes += k
		}
		work += k * l.median
		list = append(list, part{name: fmt.Sprintf("  %s (%s a cycle)", l.label(), table.Number(math2(k))), us: k * l.median})
	}
	head := []part{{"all", "the whole cycle", whole}, {"work", "server: bind and execute", work}}
	rest := whole - work - trips*trip - writes*commit - syncs*flush
	return append(append(head, list...),
		part{"trips", fmt.Sprintf("round trips (%s), each %s µs", table.Number(math2(trips)), table.Number(trip)), trips * trip},
		part{"commits", fmt.Sprintf("commits without the disk (%s), each %s µs", table.Number(math2(writes)), table.Number(commit)), writes * commit},
		part{"flush", fmt.Sprintf("waiting for the disk (%s), each %s µs", table.Number(math2(syncs)), table.Number(flush)), syncs * flush},
		part{"rest", "Go: the library, its goroutines, the scheduler", rest},
	)
}

// math2 rounds a count to two decimal places.
func math2(v float64) float64 { return float64(int(v*100+0.5)) / 100 }

// flushes returns how often the server synced its log to disk for one of the operations that run
// counts.
func (b *bench) flushes(uri string, run func() int) float64 {
	db := openDB(uri, 1)
	defer func() { _ = db.Close() }()
	count := func() (n float64, err error) {
		// The backends report with their next heartbeat.
		time.Sleep(5 * time.Second)
		err = db.QueryRowContext(b.ctx, "SELECT wal_sync FROM pg_stat_wal").Scan(&n)
		return n, err
	}
	before, err := count()
	// PostgreSQL 18 counts elsewhere. By design the number is one.
	if err != nil {
		run()
		return 1
	}
	n := run()
	after, err := count()
	check(err)
	return float64(int((after-before)/float64(n) + 0.5))
}

// logged is the server's log of one statement.
type logged struct {
	text   string
	runs   int
	median float64 // µs of bind and execute together
}

func (l logged) perRun(n int) float64 { return float64(l.runs) / float64(n) }

func (l logged) writes() bool {
	return strings.Contains(l.text, "INSERT") || strings.Contains(l.text, "UPDATE ")
}

func (l logged) label() string {
	for _, k := range []struct{ sign, name string }{
		{"claim_event = w.event", "claim"}, {"waiting = false", "acquire"}, {"SET holder_id = NULL", "release"},
		{"JOIN env_locks e ON e.repo", "look-up"}, {"IS NOT DISTINCT FROM w.id", "check of rows"},
	} {
		if strings.Contains(l.text, k.sign) {
			return k.name
		}
	}
	return l.text[:min(len(l.text), 40)]
}

var logLine = regexp.MustCompile(`\[(\d+)\] LOG:  duration: ([\d.]+) ms  (bind|execute) [^:]*: ?(.*)`)

// parseLog summarizes the log by statement, the costliest first.
func parseLog(text string) []logged {
	times := map[string][]float64{}
	binds := map[string]float64{} // by backend: the time of the last bind
	var pid, kind, statement string
	var took float64
	flush := func() {
		key := strings.Join(strings.Fields(statement), " ")
		switch kind {
		case "bind":
			binds[pid] = took
		case "execute":
			times[key] = append(times[key], took+binds[pid])
			delete(binds, pid)
		}
		kind = ""
	}
	for _, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, "\t") {
			statement += line
			continue
		}
		flush()
		if m := logLine.FindStringSubmatch(line); m != nil {
			pid, kind, statement = m[1], m[3], m[4]
			// The pattern matches only numbers.
			v, _ := strconv.ParseFloat(m[2], 64)
			took = v * 1e3
		}
	}
	flush()
	var all []logged
	for statement, t := range times {
		all = append(all, logged{statement, len(t), middle(t)})
	}
	slices.SortFunc(all, func(a, b logged) int {
		if d := b.median - a.median; d != 0 {
			return map[bool]int{true: 1, false: -1}[d > 0]
		}
		return strings.Compare(a.text, b.text)
	})
	return all
}
