package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/preemptable/locker/internal/table"
)

// results is the content of the result file: the newest run and the one before it.
type results struct {
	Runs []run `json:"runs"`
}

const kept = 2

// run is the result of one run.
type run struct {
	When    string                    `json:"when"`
	Commit  string                    `json:"commit,omitempty"`
	Go      string                    `json:"go"`
	CPUs    int                       `json:"cpus"`
	FlushMS float64                   `json:"flush_ms"` // the additional time of a commit of PostgreSQL that waits for the disk
	Seconds int                       `json:"seconds"`
	TTL     float64                   `json:"ttl_s"`
	Cut     float64                   `json:"cut_s"`
	Stores  map[storeKind]storeResult `json:"stores"`
	Peers   []*peerResult             `json:"peers"`
	Floor   *peerResult               `json:"floor,omitempty"`
}

type storeResult struct {
	Version  string `json:"version"`
	Settings string `json:"settings"`
}

// peerResult is the result of a peer.
type peerResult struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	Store    storeKind `json:"store,omitempty"`
	Versions string    `json:"versions,omitempty"`
	Client   string    `json:"client,omitempty"`
	Refresh  string    `json:"refresh,omitempty"`
	Expiry   string    `json:"expiry,omitempty"`
	Durable  string    `json:"durable,omitempty"`
	LeftOut  string    `json:"left_out,omitempty"`

	CycleMS    *figure         `json:"cycle_ms,omitempty"`
	Rates      map[int]*figure `json:"cycles_a_second,omitempty"` // by number of callers
	HandOverMS *figure         `json:"hand_over_ms,omitempty"`
	NotifiedMS *figure         `json:"notified_ms,omitempty"`
	Held       *heldResult     `json:"held,omitempty"`
	Kill       *killResult     `json:"kill,omitempty"`
	Restart    *survival       `json:"restart,omitempty"`
	Crash      *survival       `json:"crash,omitempty"`
	Silence    *survival       `json:"silence,omitempty"`
	Reset      *survival       `json:"reset,omitempty"`
}

// heldResult is the total cost of many locks held by one process, including connections.
type heldResult struct {
	Count       int   `json:"count"`
	Connections int   `json:"connections"`
	ClientBytes int64 `json:"client_bytes"`
	Goroutines  int   `json:"goroutines"`
	StoreBytes  int64 `json:"store_bytes"`
}

type killResult struct {
	Seconds *figure  `json:"seconds"`
	Fenced  bool     `json:"fenced"`
	Tokens  [2]int64 `json:"tokens"` // of the killed holder and of its successor, in the first sample
}

// survival counts the holds that outlived a fault.
type survival struct {
	Of       int     `json:"of"`
	Survived int     `json:"survived"`
	Unaware  int     `json:"unaware"`   // another process got the lock, and the holder had no way to know
	LastedMS float64 `json:"lasted_ms"` // how long the store was down, or the network was cut
}

func load(out string) (r results, err error) {
	text, err := os.ReadFile(out + ".json")
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	return r, err
}

// keepRun puts a run before the others.
func keepRun(out string, newest run) error {
	r, err := load(out)
	if err != nil {
		return err
	}
	r.Runs = append([]run{newest}, r.Runs...)
	r.Runs = r.Runs[:min(len(r.Runs), kept)]
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(out+".json", append(text, '\n'), 0o644)
}

const (
	defaultOut = "results"
	guide      = "../docs/peers.md"
)

// render writes the tables and the plot, and updates the guide.
func render(out string) error {
	r, err := load(out)
	if err != nil {
		return err
	}
	if len(r.Runs) == 0 {
		return fmt.Errorf("no run in %s.json", out)
	}
	err = errors.Join(os.WriteFile(out+".md", []byte("# Comparison with other locks\n\n"+r.markdown()), 0o644),
		os.WriteFile(out+".svg", []byte(r.Runs[0].plot()), 0o644))
	if out != defaultOut || err != nil {
		return err
	}
	return r.updateGuide()
}

// updateGuide replaces the text between the guide's markers.
func (r *results) updateGuide() error {
	const begin, end = "<!-- figures: written by `make bench-peers` from peers/results.json -->\n", "<!-- /figures -->"
	text, err := os.ReadFile(guide)
	if err != nil {
		return err
	}
	before, rest, found := strings.Cut(string(text), begin)
	_, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		return fmt.Errorf("%s has no markers", guide)
	}
	return os.WriteFile(guide, []byte(before+begin+"\n"+r.markdown()+"\n"+end+after), 0o644)
}

// markdown returns all tables. A cell has the newest run in its first line, and the one before it
// in its second.
func (r *results) markdown() string {
	newest := &r.Runs[0]
	var b strings.Builder
	b.WriteString(r.when())
	b.WriteString("\n### What is compared\n\n")
	b.WriteString(r.compared())
	for _, p := range newest.Peers {
		if p.LeftOut != "" {
			fmt.Fprintf(&b, "\n%s is left out: %s.\n", p.Name, p.LeftOut)
		}
	}
	section := func(title string, measured func(*peerResult) bool, table string) {
		if slices.ContainsFunc(newest.Peers, measured) {
			b.WriteString("\n### " + title + "\n\n" + table)
		}
	}
	section("Speed", func(p *peerResult) bool { return p.CycleMS != nil }, r.table([]column{
		{"on disk before `Lock` returns; before `Unlock` returns", func(p *peerResult) string { return p.Durable }},
		{"cycle alone", func(p *peerResult) string { return p.CycleMS.show("ms") }},
		{"16 callers", func(p *peerResult) string { return p.Rates[16].show("/s") }},
		{"256 callers", func(p *peerResult) string { return p.Rates[256].show("/s") }},
		{"release → the waiter has it", func(p *peerResult) string { return p.HandOverMS.show("ms") }},
		{"newer claim → the holder knows", func(p *peerResult) string {
			if p.ID == "floor" {
				return "–"
			}
			if p.NotifiedMS == nil {
				return "never"
			}
			return p.NotifiedMS.show("ms")
		}},
	}, true))
	section("Many held by one process", func(p *peerResult) bool { return p.Held != nil }, r.table([]column{
		{"locks", of(func(p *peerResult) *heldResult { return p.Held }, func(h *heldResult) string { return table.Number(float64(h.Count)) })},
		{"connections to the store", of(func(p *peerResult) *heldResult { return p.Held }, func(h *heldResult) string { return table.Number(float64(h.Connections)) })},
		{"memory of the client", of(func(p *peerResult) *heldResult { return p.Held }, func(h *heldResult) string { return mib(h.ClientBytes) })},
		{"goroutines of the client", of(func(p *peerResult) *heldResult { return p.Held }, func(h *heldResult) string { return table.Number(float64(h.Goroutines)) })},
		{"memory of the store", of(func(p *peerResult) *heldResult { return p.Held }, func(h *heldResult) string { return mib(h.StoreBytes) })},
	}, false))
	cut := table.Number(newest.Cut)
	section("Faults", func(p *peerResult) bool { return p.Kill != nil }, r.table([]column{
		{"a hold of the dead ends by", func(p *peerResult) string { return p.Expiry }},
		{"SIGKILL of the holder → the next may work", of(func(p *peerResult) *killResult { return p.Kill }, func(k *killResult) string { return k.Seconds.show("s") })},
		{"writes of the dead can be refused", of(func(p *peerResult) *killResult { return p.Kill }, (*killResult).fence)},
		{"survive a restart of the store", of(func(p *peerResult) *survival { return p.Restart }, (*survival).down)},
		{"survive SIGKILL of the store", of(func(p *peerResult) *survival { return p.Crash }, (*survival).down)},
		{"survive " + cut + " s of a silent network", of(func(p *peerResult) *survival { return p.Silence }, (*survival).show)},
		{"survive " + cut + " s of reset connections", of(func(p *peerResult) *survival { return p.Reset }, (*survival).show)},
	}, false))
	return b.String()
}

func (r *results) when() string {
	var b strings.Builder
	for i, n := range r.Runs {
		start := "Newest run"
		if i > 0 {
			start = "The run before"
		}
		fmt.Fprintf(&b, "%s: %s, %s, %d CPUs for servers and clients together, a commit of PostgreSQL that waits for the disk takes %s ms longer than one "+
			"that does not, TTL %s s", start, n.When, n.Go, n.CPUs, table.Number(n.FlushMS), table.Number(n.TTL))
		if n.Commit != "" {
			fmt.Fprintf(&b, ", commit %s", n.Commit)
		}
		fmt.Fprintf(&b, "; it took %d s.\n", n.Seconds)
	}
	if len(r.Runs) > 1 {
		b.WriteString("Where a cell has two lines, the first is the newest run.\n")
	}
	b.WriteString("A figure is the median of its rounds' medians, in brackets the smallest and the largest of them.\n")
	return b.String()
}

// compared returns the table of the servers and settings of the newest run.
func (r *results) compared() string {
	lines := [][]string{{"lock", "libraries", "server", "client", "a long hold is refreshed by"}, {"---", "---", "---", "---", "---"}}
	for _, p := range r.Runs[0].Peers {
		if p.LeftOut != "" {
			continue
		}
		s := r.Runs[0].Stores[p.Store]
		name, _, _ := strings.Cut(string(p.Store), ",")
		lines = append(lines, []string{p.Name, p.Versions, fmt.Sprintf("%s %s: %s", name, s.Version, s.Settings), p.Client, p.Refresh})
	}
	return table.Align(lines)
}

type column struct {
	title string
	show  func(*peerResult) string
}

// of returns a function that shows a part of a result, which may be missing.
func of[T any](part func(*peerResult) *T, show func(*T) string) func(*peerResult) string {
	return func(p *peerResult) string {
		if v := part(p); v != nil {
			return show(v)
		}
		return "–"
	}
}

// table returns a table with a line for each peer of the newest run that was measured.
func (r *results) table(columns []column, floor bool) string {
	lines := [][]string{{"lock"}, {"---"}}
	for _, c := range columns {
		lines[0] = append(lines[0], c.title)
		lines[1] = append(lines[1], "---")
	}
	rows := slices.Clone(r.Runs[0].Peers)
	if f := r.Runs[0].Floor; floor && f != nil {
		rows = append(rows, f)
	}
	for _, p := range rows {
		if p.LeftOut != "" {
			continue
		}
		line := []string{p.Name}
		for _, c := range columns {
			cell := c.show(p)
			if before := r.before(p.ID); before != nil {
				if old := c.show(before); old != cell {
					cell += "<br>" + old
				}
			}
			line = append(line, cell)
		}
		lines = append(lines, line)
	}
	return table.Align(lines)
}

// before returns a peer's result in the run before the newest one, or nil.
func (r *results) before(id string) *peerResult {
	if len(r.Runs) < 2 {
		return nil
	}
	old := r.Runs[1]
	if old.Floor != nil && old.Floor.ID == id {
		return old.Floor
	}
	for _, p := range old.Peers {
		if p.ID == id {
			return p
		}
	}
	return nil
}

func (f *figure) show(unit string) string {
	if f == nil {
		return "–"
	}
	s := table.Number(f.Value) + " " + unit
	if f.Max > f.Min {
		s += " (" + table.Number(f.Min) + "–" + table.Number(f.Max) + ")"
	}
	return s
}

func (k *killResult) fence() string {
	if k.Fenced {
		return "yes, by token"
	}
	return "no token"
}

func (s *survival) show() string {
	text := fmt.Sprintf("%d of %d", s.Survived, s.Of)
	if s.Unaware > 0 {
		text += fmt.Sprintf("; %d taken, their holders do not know", s.Unaware)
	}
	return text
}

// down also shows how long the store was down.
func (s *survival) down() string {
	return fmt.Sprintf("%s (down %s s)", s.show(), table.Number(s.LastedMS/1000))
}

func mib(bytes int64) string { return table.Number(float64(bytes)/(1<<20)) + " MiB" }
