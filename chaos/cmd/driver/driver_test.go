package main

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/preemptable/locker/chaos/broken"
	"github.com/preemptable/locker/chaos/oracle"
	"github.com/preemptable/locker/internal/pgserver"
)

// log keeps what the driver tells until it is known whether anybody wants it.
type log struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// quick is a run for a test.
func quick(t *testing.T, c config) report {
	t.Helper()
	if _, err := pgserver.FindBinDir(); errors.Is(err, pgserver.ErrNoBinaries) {
		t.Skip(err)
	}
	var l log
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.text.String())
		}
	})
	c.late, c.duration, c.clients, c.progress = 2*time.Second, 5*time.Minute, 3, &l
	r, err := run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestChaos is a short run. The long one is make chaos.
func TestChaos(t *testing.T) {
	t.Parallel()
	r := quick(t, config{seed: 1, brief: 12 * time.Second, workers: 3, keys: 6, only: []string{
		"SIGKILL", "session and listener terminated", "listener terminated", "(immediate)", "session alone", "notifications",
	}})
	t.Logf("\n%s\n%s", r.table(), r.summary())
	if err := r.failure(); err != nil {
		t.Error(err)
	}
	if len(r.lines) < 7 {
		t.Errorf("%d faults were injected", len(r.lines))
	}
}

// TestOracle shows that the oracle catches providers that are broken, and that it
// leaves one in peace that is not.
func TestOracle(t *testing.T) {
	t.Parallel()
	want := map[string]string{
		broken.None:        "",
		broken.NoFencing:   oracle.RuleTokenOrder,
		broken.TrustNotify: oracle.RuleExclusion,
		broken.UnlockOther: oracle.RuleExclusion,
	}
	for mistake, rule := range want {
		t.Run(mistake, func(t *testing.T) {
			t.Parallel()
			r := quick(t, config{seed: 1, brief: 6 * time.Second, provider: mistake, workers: 2, keys: 3, only: []string{"notifications"}})
			if rule == "" && r.failure() != nil {
				t.Error(r.failure())
			}
			if rule != "" && r.rules[rule] == 0 {
				t.Errorf("not caught; broken rules: %v", r.rules)
			}
			t.Logf("%s", r.summary())
		})
	}
}
