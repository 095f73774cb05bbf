package main

import (
	"slices"
	"time"
)

// rounds contains the durations of one side of a comparison.
type rounds [][]time.Duration

func quantile[T time.Duration | float64](values []T, q float64) T {
	if len(values) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(values))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}

func middle[T time.Duration | float64](values []T) T {
	if n := len(values); n > 0 && n%2 == 0 {
		s := slices.Sorted(slices.Values(values))
		return (s[n/2-1] + s[n/2]) / 2
	}
	return quantile(values, 0.5)
}

func (r rounds) medians() []time.Duration {
	var m []time.Duration
	for _, round := range r {
		m = append(m, middle(round))
	}
	return m
}

func (r rounds) median() time.Duration { return middle(r.medians()) }

// figure returns the median of the rounds' medians, their spread, and the 99th percentile of all
// durations.
func (r rounds) figure() *figure {
	m := r.medians()
	all := slices.Concat(r...)
	return &figure{
		Value: ms(middle(m)), Min: ms(slices.Min(m)), Max: ms(slices.Max(m)),
		P99: ms(quantile(all, 0.99)), Worst: ms(slices.Max(all)), Samples: len(all),
	}
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }

// comparison contains the durations of the library and of the floor in the same rounds.
type comparison struct{ ours, floor rounds }

func newComparison() *comparison { return &comparison{} }

// begin starts another round.
func (c *comparison) begin() {
	c.ours = append(c.ours, nil)
	c.floor = append(c.floor, nil)
}

func (r rounds) add(d time.Duration) { r[len(r)-1] = append(r[len(r)-1], d) }

// round times n runs of each side, in alternating blocks.
func (c *comparison) round(n, block int, ours, floor func()) {
	c.begin()
	for done := 0; done < n; done += block {
		for range min(block, n-done) {
			c.ours.add(timed(ours))
		}
		for range min(block, n-done) {
			c.floor.add(timed(floor))
		}
	}
}

func timed(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

// ratio compares the two sides round by round.
func (c *comparison) ratio() *figure {
	var each []float64
	for i := range c.ours {
		each = append(each, float64(middle(c.ours[i]))/float64(middle(c.floor[i])))
	}
	return spread(each)
}

func spread(values []float64) *figure {
	return &figure{Value: middle(values), Min: slices.Min(values), Max: slices.Max(values), Samples: len(values)}
}

// rates is the same for two series of events per second.
type rates struct{ ours, floor []float64 }

func (r *rates) ratio() *figure {
	var each []float64
	for i := range r.ours {
		each = append(each, r.ours[i]/r.floor[i])
	}
	return spread(each)
}
