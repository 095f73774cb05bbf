package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/preemptable/locker/chaos/broken"
	"github.com/preemptable/locker/chaos/oracle"
	"github.com/preemptable/locker/internal/pgserver"
)

// log collects the driver's output until it is known whether it is of interest.
type log struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// worker builds the worker for all tests. TestMain removes it.
var worker = sync.OnceValues(func() (string, error) { return build(context.Background(), folder) })

var folder string

func TestMain(m *testing.M) {
	var err error
	if folder, err = os.MkdirTemp("", "chaos-"); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(folder)
	os.Exit(code)
}

// quick runs a short run for a test.
func quick(t *testing.T, c config) report {
	t.Helper()
	if _, err := pgserver.FindBinDir(); errors.Is(err, pgserver.ErrNoBinaries) {
		t.Skip(err)
	}
	var err error
	if c.binary, err = worker(); err != nil {
		t.Fatal(err)
	}
	var l log
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.text.String())
		}
	})
	c.late, c.duration, c.clients, c.progress, c.spared, c.out = 2*time.Second, 5*time.Minute, 3, 1, 4*time.Second, &l
	r, err := run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestChaos is a short run. The long one is make chaos.
func TestChaos(t *testing.T) {
	t.Parallel()
	r := quick(t, config{seed: 1, sessions: []time.Duration{10 * time.Second}, brief: 12 * time.Second, workers: 3, keys: 6, faults: []string{
		"SIGKILL of a worker", "all connections terminated", "(immediate)", "read-only for 3 s", "logins refused for 2 s", "NOTIFY fails",
		"error replies to the session", "error replies to the listener", "the old one lives on",
	}})
	t.Logf("\n%s\n%s", r.table(), r.summary())
	if err := r.failure(); err != nil {
		t.Error(err)
	}
	if len(r.lines) < 9 {
		t.Errorf("%d faults were injected", len(r.lines))
	}
}

// TestOracle shows that the oracle catches the broken providers, and accepts the one that is not
// broken.
func TestOracle(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		mistake string
		session time.Duration // timeout
		faults  []string
		settle  time.Duration
		rules   []string // rules that the provider has to break
	}{
		{broken.None, 10 * time.Second, []string{"notifications", "SIGKILL of a worker", "all connections terminated", "silent for 3 s", "cut as statements", "read-only for 3 s"}, 0, nil},
		{broken.NoFencing, 4 * time.Second, []string{"notifications"}, 0, []string{oracle.RuleTokenOrder}},
		{broken.TrustNotify, 4 * time.Second, []string{"notifications"}, 0, []string{oracle.RuleExclusion}},
		{broken.UnlockOther, 4 * time.Second, []string{"notifications"}, 0, []string{oracle.RuleExclusion}},
		{broken.LoseOnCut, 10 * time.Second, []string{"all connections terminated", "connections cut", "logins refused for 2 s"}, 0, []string{oracle.RuleKept}},
		{broken.HoldOn, 4 * time.Second, []string{"network silent for 8 s"}, 0, []string{oracle.RuleLost}},
		{broken.GiveUp, 4 * time.Second, []string{"cut as statements"}, 0, []string{oracle.RuleFailed}},
		{broken.TakeSuspended, 10 * time.Second, []string{"SIGKILL of a worker", "network silent for 8 s"}, 0, []string{oracle.RuleEarly, oracle.RuleExclusion}},
		{broken.NeverTake, 4 * time.Second, []string{"SIGKILL of a worker"}, 0, []string{oracle.RuleStuck}},
		{broken.StopForFinish, 4 * time.Second, []string{"notifications"}, 0, []string{oracle.RuleDisturbed}},
		{broken.NoBound, 4 * time.Second, []string{"notifications"}, 0, []string{oracle.RuleStarved}},
		{broken.SkipFree, 4 * time.Second, []string{"notifications"}, 0, []string{oracle.RuleSkipped}},
		{broken.PassWaiters, 4 * time.Second, []string{"notifications"}, 15 * time.Second, []string{oracle.RulePassed}},
		{broken.ForgetRelease, 6 * time.Second, []string{"logins refused for 2 s"}, 40 * time.Second, []string{oracle.RuleStuck}},
	} {
		t.Run(c.mistake, func(t *testing.T) {
			t.Parallel()
			// The effect of a mistake depends on the state of the claims when the fault begins. It
			// has to be caught in one of five runs.
			var missed []string
			keys := 3
			if c.mistake == broken.SkipFree {
				// Most keys are free.
				keys = 12
			}
			for seed := range int64(5) {
				r := quick(t, config{seed: uint64(seed + 1), sessions: []time.Duration{c.session}, brief: 12 * time.Second, settle: c.settle, provider: c.mistake, workers: 2, keys: keys, faults: c.faults})
				t.Logf("%s", r.summary())
				if len(c.rules) == 0 && r.failure() != nil {
					t.Errorf("%v; broken rules: %v", r.failure(), r.rules)
				}
				missed = nil
				for _, rule := range c.rules {
					if r.rules[rule] == 0 {
						missed = append(missed, rule)
					}
				}
				if len(missed) == 0 {
					break
				}
			}
			if len(missed) > 0 {
				t.Errorf("%q were not caught", missed)
			}
		})
	}
}
