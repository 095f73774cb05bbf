package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/preemptable/locker/internal/table"
)

const (
	capacityGuide = "docs/capacity.md"
	figuresBegin  = "<!-- figures:"
	figuresEnd    = "<!-- /figures -->"
)

// updateGuide writes the figures that the capacity guide quotes into it, so that it never differs
// from the result file. It does nothing if there is no guide.
func updateGuide(r *result) {
	text, err := os.ReadFile(capacityGuide)
	if err != nil {
		return
	}
	before, rest, ok1 := strings.Cut(string(text), figuresBegin)
	comment, rest, ok2 := strings.Cut(rest, "\n")
	_, after, ok3 := strings.Cut(rest, figuresEnd)
	if !ok1 || !ok2 || !ok3 {
		check(fmt.Errorf("%s: the marks around the figures are missing", capacityGuide))
	}
	writeFile(capacityGuide, before+figuresBegin+comment+"\n\n"+capacityTable(r)+"\n"+figuresEnd+after)
}

func capacityTable(r *result) string {
	find := func(group, name string) (row, bool) {
		for _, w := range r.Rows {
			if strings.Contains(w.Group, group) && strings.Contains(w.Name, name) {
				return w, true
			}
		}
		return row{}, false
	}
	lines := [][]string{{"one stock PostgreSQL carries", "measured", "the floor", "what gives out first", "what moves it"}, {"---", "---", "---", "---", "---"}}
	add := func(what, group, name, limit, moves string) {
		w, ok := find(group, name)
		if !ok {
			return
		}
		floor := "–"
		if w.Floor != nil {
			floor = (&figure{Value: w.Floor.Value}).show(w.Unit)
			if w.What != "" {
				floor += ", " + w.What
			}
		}
		ours := (&figure{Value: w.Ours.Value}).show(w.Unit)
		if w.Extra != nil {
			ours += ", worst " + table.Number(*w.Extra)
		}
		lines = append(lines, []string{what, ours, floor, limit, moves})
	}
	const single, several, many = "one provider", "several providers", "10,000 locks held by one"
	const most, restart, cut = "100,000 locks held by one", "immediate restart of the server, 10,000 locks", "busy callers"
	add("cycles per second, one caller", single, "1 worker", "2 round trips and a flush, one after the other", "a server nearby, a fast disk for `pg_wal`")
	add("cycles per second, 256 callers in one service", single, "256 workers", "processor", "cores")
	add("cycles per second, 1,024 callers in one service", single, "1,024 workers", "processor", "cores")
	add("cycles per second, 256 callers in 4 services", several, "on 4 providers", "processor, flushes: each service batches for itself", "fewer, larger services; cores; disk")
	add("cycles per second, 256 callers in 16 services", several, "on 16 providers", "processor, flushes: each service batches for itself", "fewer, larger services; cores; disk")
	add("claims per second on contended keys", "contended", "claims on", "processor; NOTIFY commits one after the other, server-wide", "another server")
	add("one more cycle in a service that holds 10,000 locks", many, "one more Lock", "–", "–")
	add("one more cycle in a service that holds 100,000 locks", most, "one more Lock", "–", "–")
	add("memory of a service for each of 100,000 locks", most, "memory per lock", "memory of the service", "more services")
	add("entries in the lock table for 100,000 locks", most, "entries", "–", "–")
	add("transactions per second of an idle service that holds 10,000", many, "transactions", "–", "–")
	add("holds notified or lost by a crash of the server, of 10,000", restart, "notified or lost", "the session timeout", "`WithSessionTimeout`")
	add("time until they have reconnected, of 10,000", restart, "reconnected", "–", "–")
	add("errors of 256 callers whose connections are cut 8 times", cut, "errors", "their lock timeout", "`WithLockTimeout`")
	lines = append(lines, []string{"services", "48, or 24 that are all busy", "–", "two connections for each, three while it holds locks, four when it is busy", "`max_connections`"})
	return fmt.Sprintf("Taken %s on %d CPUs, for the server and the benchmark together, with PostgreSQL %s; a flush of the disk takes %s ms there.\n\n%s",
		strings.Fields(r.When)[0], r.CPUs, strings.Fields(r.Postgres)[0], table.Number(r.FlushMS), table.Align(lines))
}
