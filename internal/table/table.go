// Package table writes Markdown tables for the result files of the benchmarks.
package table

import (
	"fmt"
	"math"
	"strings"
)

// Align returns a Markdown table whose cells are padded to the width of their columns. A
// cell of three dashes is filled with dashes.
func Align(lines [][]string) string {
	width := make([]int, len(lines[0]))
	for _, line := range lines {
		for i, cell := range line {
			width[i] = max(width[i], len([]rune(cell)))
		}
	}
	var b strings.Builder
	for _, line := range lines {
		for i, cell := range line {
			fill := " "
			if cell == "---" {
				fill = "-"
			}
			b.WriteString("| " + cell + strings.Repeat(fill, width[i]-len([]rune(cell))) + " ")
		}
		b.WriteString("|\n")
	}
	return b.String()
}

// Number formats a number with three significant digits.
func Number(v float64) string {
	switch a := math.Abs(v); {
	case v == math.Trunc(v) && a < 1e6, a >= 1000:
		s := fmt.Sprintf("%.0f", v)
		for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
			s = s[:i] + "," + s[i:]
		}
		return s
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.1:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.3f", v)
	}
}
