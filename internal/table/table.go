// Package table writes Markdown tables for the result files of the benchmarks.
package table

import "strings"

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
