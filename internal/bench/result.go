package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/preemptable/locker/internal/table"
)

// result is the result of a run.
type result struct {
	When     string  `json:"when"`
	Commit   string  `json:"commit,omitempty"`
	Go       string  `json:"go"`
	CPUs     int     `json:"cpus"`
	Postgres string  `json:"postgres"`
	Settings string  `json:"settings"`
	FlushMS  float64 `json:"flush_ms"` // the additional time of a commit that waits for the disk
	Seconds  int     `json:"seconds"`
	Rows     []row   `json:"rows"`
}

// row is a line of the table.
type row struct {
	Group  string   `json:"group"`
	Name   string   `json:"name"`
	X      float64  `json:"x,omitempty"` // the position in the plot
	Unit   string   `json:"unit,omitempty"`
	Ours   *figure  `json:"ours"`
	Floor  *figure  `json:"floor,omitempty"`
	What   string   `json:"what,omitempty"` // describes the floor
	Ratio  *figure  `json:"ratio,omitempty"`
	Target *target  `json:"target,omitempty"`
	Met    *bool    `json:"met,omitempty"`
	Extra  *float64 `json:"worst,omitempty"` // the worst sample, where it is of interest
}

type figure struct {
	Value   float64 `json:"value"`
	Min     float64 `json:"min,omitempty"`
	Max     float64 `json:"max,omitempty"`
	P99     float64 `json:"p99,omitempty"`
	Worst   float64 `json:"worst,omitempty"`
	Samples int     `json:"samples,omitempty"`
}

// target is a bound on the ratio, or on the figure itself.
type target struct {
	Bound   float64 `json:"bound"`
	AtLeast bool    `json:"at_least,omitempty"`
	Ratio   bool    `json:"ratio,omitempty"`
}

func atMost(bound float64) *target       { return &target{Bound: bound} }
func ratioAtMost(bound float64) *target  { return &target{Bound: bound, Ratio: true} }
func ratioAtLeast(bound float64) *target { return &target{Bound: bound, Ratio: true, AtLeast: true} }

func value(v float64) *figure { return &figure{Value: v} }

func (r *result) add(rows ...row) {
	for _, w := range rows {
		if w.Ratio == nil && w.Floor != nil && w.Floor.Value != 0 {
			w.Ratio = value(w.Ours.Value / w.Floor.Value)
		}
		if t := w.Target; t != nil {
			v := w.Ours.Value
			if t.Ratio {
				v = w.Ratio.Value
			}
			met := v <= t.Bound
			if t.AtLeast {
				met = v >= t.Bound
			}
			w.Met = &met
		}
		r.Rows = append(r.Rows, w)
	}
}

func (f *figure) show(unit string) string {
	if f == nil {
		return "–"
	}
	s := table.Number(f.Value)
	if unit != "" {
		s += " " + unit
	}
	if f.Max > f.Min {
		s += " (" + table.Number(f.Min) + "–" + table.Number(f.Max) + ")"
	}
	if f.P99 > 0 {
		s += ", p99 " + table.Number(f.P99)
	}
	return s
}

func (w row) cells() []string {
	ours, floor, ratio, goal, met := w.Ours.show(w.Unit), "–", "–", "–", "–"
	if w.Extra != nil {
		ours += ", worst " + table.Number(*w.Extra)
	}
	if w.Floor != nil {
		floor = w.Floor.show(w.Unit)
		if w.What != "" {
			floor += ", " + w.What
		}
	}
	if w.Ratio != nil {
		ratio = w.Ratio.show("×")
	}
	if t := w.Target; t != nil {
		goal, met = "≤ ", "no"
		if t.AtLeast {
			goal = "≥ "
		}
		goal += table.Number(t.Bound)
		if t.Ratio {
			goal += " ×"
		} else if w.Unit != "" {
			goal += " " + w.Unit
		}
		if *w.Met {
			met = "yes"
		}
	}
	return []string{w.Name, ours, floor, ratio, goal, met}
}

// table returns the whole result in Markdown.
func (r *result) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Benchmark\n\n%s, %s, %d CPUs, PostgreSQL %s (%s)", r.When, r.Go, r.CPUs, r.Postgres, r.Settings)
	if r.Commit != "" {
		fmt.Fprintf(&b, ", commit %s", r.Commit)
	}
	fmt.Fprintf(&b, ". A commit that waits for the disk takes %s ms longer than one that does not. The run took %d s.\n\n", table.Number(r.FlushMS), r.Seconds)
	b.WriteString("The floor is raw PostgreSQL in the same run, interleaved with ours. A figure is the median of its rounds' medians, in brackets\n" +
		"the smallest and the largest of them; p99 and worst are of all samples.\n")
	for rows := r.Rows; len(rows) > 0; {
		group := rows[0].Group
		n := slices.IndexFunc(rows, func(w row) bool { return w.Group != group })
		if n < 0 {
			n = len(rows)
		}
		lines := [][]string{{"", "ours", "floor", "ours ÷ floor", "target", "met"}, {"---", "---", "---", "---", "---", "---"}}
		for _, w := range rows[:n] {
			lines = append(lines, w.cells())
		}
		b.WriteString("\n## " + group + "\n\n" + table.Align(lines))
		rows = rows[n:]
	}
	return b.String()
}

func (r *result) write(out string) {
	text, err := json.MarshalIndent(r, "", "  ")
	check(err)
	writeFile(out+".md", r.table())
	writeFile(out+".json", string(text)+"\n")
}

func writeFile(name, text string) {
	check(os.MkdirAll(filepath.Dir(name), 0o755))
	check(os.WriteFile(name, []byte(text), 0o644))
}
