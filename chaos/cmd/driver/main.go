// The driver runs PostgreSQL servers and worker processes, injects faults depending on the seed,
// and judges the events that the workers have recorded.
//
//	go run ./cmd/driver [-seed n] [-duration d] [-fault names] [-table file]
//	go run ./cmd/driver -judge history[,history] [-table file]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/preemptable/locker/chaos/fault"
)

func main() {
	var c config
	seeds := flag.String("seed", os.Getenv("SEED"), "what happens when; several, separated by commas, run one after the other; empty: a random one (SEED in the environment)")
	flag.DurationVar(&c.duration, "duration", 22*time.Minute, "of one seed's run, about")
	flag.IntVar(&c.workers, "workers", 4, "worker processes")
	flag.IntVar(&c.clients, "clients", 3, "claims of a worker at a time")
	flag.IntVar(&c.keys, "keys", 8, "keys")
	names := flag.String("fault", "", "only the faults whose name contains one of these words, separated by commas, each alone (\"mixed\" is one, and so is each loss of a server of two); empty: each alone for half of the time, in a random order, then mixed")
	flag.IntVar(&c.rounds, "rounds", 0, "how often each fault is run alone; 0: as often as fits into 40 s")
	timeouts := flag.String("session-timeout", "10s", "of the workers; several are separated by commas, and used one after the other")
	flag.IntVar(&c.progress, "progress", 2, "how many holds of a key in a row claims may end; 0: any number")
	flag.DurationVar(&c.spared, "spared", 5*time.Second, "for how long the next hold is let finish")
	list := flag.Bool("list", false, "run nothing: list the faults")
	table := flag.String("table", "", "write the table into this file, between its two marks")
	flag.StringVar(&c.history, "history", "", "write all that happened into this file, which -judge reads")
	judge := flag.String("judge", "", "run nothing: judge the histories in these files, separated by commas")
	flag.BoolVar(&c.verbose, "v", false, "the workers' log on standard error")
	flag.Parse()
	if *names != "" {
		c.faults = strings.Split(*names, ",")
	}
	if *list {
		for _, f := range fault.Faults() {
			fmt.Println(f.Name)
		}
		for _, f := range failovers {
			fmt.Println(f.name)
		}
		return
	}
	for text := range strings.SplitSeq(*timeouts, ",") {
		d, err := time.ParseDuration(strings.TrimSpace(text))
		if err != nil {
			fmt.Fprintln(os.Stderr, "chaos: -session-timeout:", err)
			os.Exit(2)
		}
		c.sessions = append(c.sessions, d)
	}
	if *seeds == "" {
		*seeds = strconv.Itoa(rand.IntN(1_000_000))
	}
	c.out = os.Stdout

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	var all report
	if *judge != "" {
		*seeds = ""
		for _, name := range strings.Split(*judge, ",") {
			r, err := rejudge(name)
			if err != nil {
				fmt.Fprintln(os.Stderr, "chaos:", err)
				os.Exit(2)
			}
			all.add(r)
		}
	}
	for text := range strings.SplitSeq(*seeds, ",") {
		if text == "" {
			continue
		}
		seed, err := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
		if err != nil {
			fmt.Fprintln(os.Stderr, "chaos: -seed:", err)
			os.Exit(2)
		}
		c.seed = seed
		r, err := run(ctx, c)
		if err != nil {
			fmt.Fprintln(os.Stderr, "chaos:", err)
			os.Exit(2)
		}
		all.add(r)
		if ctx.Err() != nil {
			break
		}
	}
	fmt.Print("\n", all.table(), "\n", all.summary(), "\n")
	if *table != "" {
		if err := all.writeInto(*table); err != nil {
			fmt.Fprintln(os.Stderr, "chaos:", err)
			os.Exit(2)
		}
	}
	if err := all.failure(); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		os.Exit(130)
	}
}
