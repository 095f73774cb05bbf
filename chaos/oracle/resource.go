package oracle

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
)

// CheckRows judges the resource's own record: whatever the workers have recorded, no write with an
// older token was accepted after one with a newer token.
func CheckRows(rows []Row) []Violation {
	rows = slices.Clone(rows)
	slices.SortFunc(rows, func(a, b Row) int { return cmp.Compare(a.Seq, b.Seq) })
	var violations []Violation
	newest := map[int64]Row{}
	for _, r := range rows {
		if !r.Accepted {
			continue
		}
		if last, ok := newest[r.Key]; ok && r.Token < last.Token {
			violations = append(violations, Violation{RuleFence, 0, r.Key, r.Claim,
				fmt.Sprintf("token %d was accepted after token %d of %s", r.Token, last.Token, last.Claim)})
			continue
		}
		newest[r.Key] = r
	}
	return violations
}

type attempt struct {
	key, token int64
}

// register is the model of the fenced resource: one number for each key, which never decreases.
var register = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[int64][]porcupine.Operation{}
		for _, o := range history {
			key := o.Input.(attempt).key
			byKey[key] = append(byKey[key], o)
		}
		var parts [][]porcupine.Operation
		for _, part := range byKey {
			parts = append(parts, part)
		}
		return parts
	},
	Init: func() any { return int64(0) },
	Step: func(state, input, output any) (bool, any) {
		highest, token := state.(int64), input.(attempt).token
		accepted := token >= highest
		return accepted == output.(bool), max(highest, token)
	},
}

// CheckResource reports whether the responses that the workers got are those of a resource that
// compares tokens. It judges the instrument itself. Writes whose responses were lost with their
// worker are taken from the resource's record. It returns false only if it is sure within limit.
func CheckResource(events []Event, rows []Row, limit time.Duration) bool {
	clients := map[string]int{}
	known := map[string]int{}
	last := map[string]int64{}
	client := func(claim string) int {
		if _, ok := clients[claim]; !ok {
			clients[claim] = len(clients)
		}
		return clients[claim]
	}
	var ops []porcupine.Operation
	for _, e := range events {
		if e.Kind != Write {
			continue
		}
		known[e.Claim]++
		last[e.Claim] = max(last[e.Claim], e.At)
		ops = append(ops, porcupine.Operation{ClientId: client(e.Claim), Input: attempt{e.Key, e.Token}, Output: e.OK, Call: e.Start, Return: e.At})
	}
	rows = slices.Clone(rows)
	slices.SortFunc(rows, func(a, b Row) int { return cmp.Compare(a.Seq, b.Seq) })
	for _, r := range rows {
		if known[r.Claim]--; known[r.Claim] < 0 {
			ops = append(ops, porcupine.Operation{ClientId: client(r.Claim), Input: attempt{r.Key, r.Token}, Output: r.Accepted, Call: last[r.Claim], Return: math.MaxInt64})
		}
	}
	return porcupine.CheckOperationsTimeout(register, ops, limit) != porcupine.Illegal
}
