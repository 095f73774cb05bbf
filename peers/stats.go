package main

import (
	"slices"
	"time"
)

// figure is a median, with the smallest and the largest of its values.
type figure struct {
	Value   float64 `json:"value"`
	Min     float64 `json:"min,omitempty"`
	Max     float64 `json:"max,omitempty"`
	Samples int     `json:"samples,omitempty"`
}

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// spread returns the figure of some values, or nil if there are none.
func spread(values []float64) *figure {
	if len(values) == 0 {
		return nil
	}
	return &figure{Value: median(values), Min: slices.Min(values), Max: slices.Max(values), Samples: len(values)}
}

// rounds contains the samples of some rounds, in milliseconds.
type rounds [][]float64

func (r *rounds) begin() { *r = append(*r, nil) }

func (r rounds) add(d time.Duration) { r[len(r)-1] = append(r[len(r)-1], ms(d)) }

// figure returns the median of the rounds' medians.
func (r rounds) figure() *figure {
	var medians []float64
	n := 0
	for _, round := range r {
		if len(round) > 0 {
			medians = append(medians, median(round))
			n += len(round)
		}
	}
	f := spread(medians)
	if f != nil {
		f.Samples = n
	}
	return f
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }
