package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
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
	amber = "#c27803" // the floor
)

// plotFile writes out.md and out.svg from out.json, and the figures in the capacity guide.
func plotFile(out string) {
	text, err := os.ReadFile(out + ".json")
	check(err)
	var r result
	check(json.Unmarshal(text, &r))
	writeFile(out+".md", r.table())
	var b strings.Builder
	b.WriteString(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 380" width="860" height="380" role="img" ` +
		`font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="12" fill="` + ink + `">` + "\n")
	b.WriteString("<title>Throughput by workers, and the cost of one more cycle by locks held</title>\n")
	left := panel{x: 66, y: 64, w: 340, h: 250, title: "Cycles per second, one provider", axis: "workers, each on its own key"}
	right := panel{x: 496, y: 64, w: 340, h: 250, title: "One more Lock + Release, in ms", axis: "locks held by the same provider"}
	left.draw(&b,
		r.curve("ours, four connections", blue, "", "Cycles per second, one provider", "", func(w row) *figure { return w.Ours }),
		r.curve("raw advisory-lock pairs, 64 connections", amber, "6 4", "Cycles per second, one provider", "", func(w row) *figure { return w.Floor }))
	right.draw(&b,
		r.curve("ours", blue, "", "held by one provider", "one more Lock + Release", func(w row) *figure { return w.Ours }),
		r.curve("raw advisory-lock pair", amber, "6 4", "held by one provider", "one more Lock + Release, against a raw pair", func(w row) *figure { return w.Floor }))
	fmt.Fprintf(&b, `<text x="430" y="372" text-anchor="middle" font-size="11">PostgreSQL %s with stock settings, %d CPUs for server and benchmark together, %s. Bars: the rounds' smallest and largest.</text>`+"\n",
		strings.Fields(r.Postgres)[0], r.CPUs, strings.Fields(r.When)[0])
	b.WriteString("</svg>\n")
	writeFile(out+".svg", b.String())
	if out == defaultOut {
		updateGuide(&r)
	}
}

type curve struct {
	name, colour, dash string
	points             []point
}

type point struct{ x, y, low, high float64 }

// curve returns the rows of a group, and of a name if one is given, that have a place on the x
// axis.
func (r *result) curve(name, colour, dash, group, rowName string, of func(row) *figure) curve {
	c := curve{name: name, colour: colour, dash: dash}
	for _, w := range r.Rows {
		f := of(w)
		if !strings.HasSuffix(w.Group, group) || w.X == 0 || rowName != "" && w.Name != rowName || f == nil {
			continue
		}
		c.points = append(c.points, point{w.X, f.Value, f.Min, f.Max})
	}
	return c
}

// panel is one diagram. Its x axis is logarithmic, and its y axis begins at zero.
type panel struct {
	x, y, w, h  float64
	title, axis string
}

func (p panel) draw(b *strings.Builder, curves ...curve) {
	var top, right float64
	left := math.Inf(1)
	for _, c := range curves {
		for _, q := range c.points {
			top, left, right = max(top, q.y, q.high), min(left, q.x), max(right, q.x)
		}
	}
	if top == 0 || right <= left {
		return
	}
	step := niceStep(top / 5)
	top = step * math.Ceil(top/step*1.02)
	px := func(x float64) float64 { return p.x + 14 + (p.w-28)*math.Log(x/left)/math.Log(right/left) }
	py := func(y float64) float64 { return p.y + p.h*(1-y/top) }

	fmt.Fprintf(b, `<text x="%.1f" y="18" font-size="14" font-weight="600">%s</text>`+"\n", p.x, p.title)
	for i := 0; float64(i)*step <= top*1.001; i++ {
		y := py(float64(i) * step)
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`, p.x, y, p.x+p.w, y, faint)
		fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="end">%s</text>`+"\n", p.x-8, y+4, tick(float64(i)*step))
	}
	fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`+"\n", p.x, p.y+p.h, p.x+p.w, p.y+p.h, ink)
	for _, q := range curves[0].points {
		fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="middle">%s</text>`, px(q.x), p.y+p.h+18, tick(q.x))
	}
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="middle">%s</text>`+"\n", p.x+p.w/2, p.y+p.h+38, p.axis)

	for i, c := range curves {
		var path []string
		for _, q := range c.points {
			path = append(path, fmt.Sprintf("%.1f,%.1f", px(q.x), py(q.y)))
			if q.high > q.low {
				fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-opacity="0.6"/>`, px(q.x), py(q.low), px(q.x), py(q.high), c.colour)
			}
			fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`, px(q.x), py(q.y), c.colour)
		}
		dash := ""
		if c.dash != "" {
			dash = ` stroke-dasharray="` + c.dash + `"`
		}
		fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"%s/>`+"\n", strings.Join(path, " "), c.colour, dash)
		// Each line of the legend is above the diagram.
		y := 36 + 16*float64(i)
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="2"%s/>`, p.x, y-4, p.x+26, y-4, c.colour, dash)
		fmt.Fprintf(b, `<text x="%.1f" y="%.1f" fill="%s">%s</text>`+"\n", p.x+32, y, c.colour, c.name)
	}
}

// niceStep returns the next of 1, 2, 5 times a power of ten.
func niceStep(v float64) float64 {
	base := math.Pow(10, math.Floor(math.Log10(v)))
	for _, m := range []float64{1, 2, 5} {
		if m*base >= v {
			return m * base
		}
	}
	return 10 * base
}

// tick formats a number on an axis, without rounding residues.
func tick(v float64) string {
	if v >= 1000 {
		return table.Number(math.Round(v))
	}
	return strconv.FormatFloat(math.Round(v*1000)/1000, 'f', -1, 64)
}
