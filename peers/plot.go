package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/preemptable/locker/internal/table"
)

// The colours are readable on white and on black, because a picture cannot know the theme of its
// page.
const (
	ink   = "#768390" // text and axes
	faint = "#76839040"
	blue  = "#388bfd" // ours
	amber = "#c27803" // others, on disk before they return
	grey  = "#8b949e" // others, not on disk
)

// plot draws three panels of bars, one bar for each peer.
func (n *run) plot() string {
	var rows []*peerResult
	for _, p := range n.Peers {
		if p.LeftOut == "" {
			rows = append(rows, p)
		}
	}
	const line, top, names = 24.0, 62.0, 168.0
	height := top + line*float64(len(rows)) + 76
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 %[1]g" width="900" height="%[1]g" role="img" `+
		`font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="12" fill="%[2]s">`+"\n", height, ink)
	b.WriteString("<title>Locks compared: cycles per second, hand-over, the time after a crash</title>\n")
	for i, p := range rows {
		weight := ""
		if p.ID == "locker" {
			weight = ` font-weight="600"`
		}
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="end"%s>%s</text>`+"\n", names-8, top+line*float64(i)+16, weight, strings.ReplaceAll(p.Name, "`", ""))
	}
	for i, q := range []bars{
		{"Cycles per second, 256 callers", "more is better", "/s", func(p *peerResult) *figure { return p.Rates[256] }},
		{"Release → the waiter has it", "less is better", "ms", func(p *peerResult) *figure { return p.HandOverMS }},
		{"SIGKILL → the next may work", "less is better", "s", func(p *peerResult) *figure {
			if p.Kill == nil {
				return nil
			}
			return p.Kill.Seconds
		}},
	} {
		q.draw(&b, rows, names+float64(i)*246, top, 150, line)
	}
	legend := top + line*float64(len(rows)) + 36
	x := names
	for _, c := range []struct{ colour, text string }{
		{blue, "locker: on disk before Lock returns"}, {amber, "on disk before Lock returns"}, {grey, "not on disk"},
	} {
		fmt.Fprintf(&b, `<rect x="%.1f" y="%.1f" width="12" height="12" fill="%s"/><text x="%.1f" y="%.1f">%s</text>`+"\n", x, legend-10, c.colour, x+18, legend, c.text)
		x += 60 + 6.2*float64(len(c.text))
	}
	fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" font-size="11">%d CPUs for servers and clients together, %s. Axes are logarithmic. Lines: the rounds' smallest and largest.</text>`+"\n",
		names, legend+24, n.CPUs, strings.Fields(n.When)[0])
	b.WriteString("</svg>\n")
	return b.String()
}

// bars is one panel.
type bars struct {
	title, hint, unit string
	of                func(*peerResult) *figure
}

// draw draws a panel whose axis is logarithmic and begins at the next power of ten below the
// smallest figure.
func (q bars) draw(b *strings.Builder, rows []*peerResult, x, y, width, line float64) {
	low, high := math.Inf(1), 0.0
	for _, p := range rows {
		if f := q.of(p); f != nil && f.Value > 0 {
			low, high = min(low, f.Value), max(high, f.Value, f.Max)
		}
	}
	if high == 0 {
		return
	}
	from := math.Floor(math.Log10(low))
	to := math.Max(math.Ceil(math.Log10(high)), from+1)
	at := func(v float64) float64 {
		return x + width*min(1, max(0, (math.Log10(v)-from)/(to-from)))
	}
	bottom := y + line*float64(len(rows))
	fmt.Fprintf(b, `<text x="%.1f" y="20" font-size="14" font-weight="600">%s</text><text x="%.1f" y="38" font-size="11">%s</text>`+"\n", x, q.title, x, q.hint)
	for e := from; e <= to; e++ {
		v := math.Pow(10, e)
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/><text x="%.1f" y="%.1f" text-anchor="middle" font-size="10">%s</text>`+"\n",
			at(v), y-4, at(v), bottom, faint, at(v), bottom+13, tick(v))
	}
	for i, p := range rows {
		f := q.of(p)
		if f == nil || f.Value <= 0 {
			continue
		}
		colour := grey
		switch {
		case p.ID == "locker":
			colour = blue
		case strings.HasPrefix(p.Durable, "yes"):
			colour = amber
		}
		middle := y + line*float64(i) + 12
		fmt.Fprintf(b, `<rect x="%.1f" y="%.1f" width="%.1f" height="12" fill="%s"/>`, x, middle-6, max(1, at(f.Value)-x), colour)
		if f.Max > f.Min && f.Min > 0 {
			fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`, at(f.Min), middle, at(f.Max), middle, ink)
		}
		fmt.Fprintf(b, `<text x="%.1f" y="%.1f" font-size="11">%s %s</text>`+"\n", max(at(f.Value), at(f.Max))+5, middle+4, table.Number(f.Value), q.unit)
	}
}

// tick formats a power of ten on an axis.
func tick(v float64) string {
	if v >= 1000 {
		return table.Number(math.Round(v))
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}
