//go:build unix

package locker

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/require"
)

const (
	frozenURI         = "LOCKER_TEST_FROZEN_URI" // set in the process that is stopped
	frozenApplication = "frozen"
	frozenTimeout     = 2 * time.Second
)

// C24, C25: a process that is stopped with SIGSTOP keeps nothing, even if its listener cannot
// receive what it is sent. Its keys are taken over, its connections end, and the server's queue of
// notifications is drained. When it continues, its holder is notified.
func TestFrozenProcess(t *testing.T) {
	if uri := os.Getenv(frozenURI); uri != "" {
		frozenProcess(t, uri)
		return
	}
	t.Parallel()
	// All databases of a server share one queue.
	server := pgCluster(t, pgserver.Options{})
	uri := server.URI("postgres")
	db := pgDB(t, uri)

	process := exec.Command(os.Args[0], "-test.run=^TestFrozenProcess$")
	process.Env = append(os.Environ(), frozenURI+"="+pgNamed(t, uri, frozenApplication))
	process.Stderr = os.Stderr
	out, err := process.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, process.Start())
	lines := make(chan string, 16)
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(out); in.Scan(); {
			lines <- in.Text()
		}
	}()
	t.Cleanup(func() {
		_ = process.Process.Kill()
		// The pipe is closed when the process has ended.
		for range lines {
		}
		_ = process.Wait()
	})
	require.Equal(t, "held", pgReceive(t, "the process holds", lines))

	p := pgProvider(t, uri, WithSessionTimeout(frozenTimeout))
	next, granted := pgWait(t, p, 1, "next")
	require.NoError(t, process.Process.Signal(syscall.SIGSTOP))
	frozen := time.Now()
	pgExec(t, db, `SELECT pg_notify('`+notifyChannel+`', n || repeat('x', 7900)) FROM generate_series(1, 3000) AS n`)
	flooded := pgGet[float64](t, db, `SELECT pg_notification_queue_usage()`)
	require.Positive(t, flooded, "the listener has taken everything")

	require.NoError(t, pgReceive(t, "the next one takes over", granted))
	free := time.Since(frozen)
	require.GreaterOrEqual(t, free, frozenTimeout)
	pgUntil(t, "the process has no connection left", func() bool {
		return pgGet[int](t, db, `SELECT count(*) FROM pg_stat_activity WHERE application_name = $1`, frozenApplication) == 0
	})
	gone := time.Since(frozen)
	pgUntil(t, "the queue is drained", func() bool {
		// The server advances the queue's tail only after a notification.
		pgExec(t, db, `SELECT pg_notify('other', '')`)
		return pgGet[float64](t, db, `SELECT pg_notification_queue_usage()`) < flooded/2
	})
	t.Logf("after SIGSTOP with a session timeout of %v: key taken over after %v, connections gone after %v, queue drained after %v",
		frozenTimeout, free.Round(10*time.Millisecond), gone.Round(10*time.Millisecond), time.Since(frozen).Round(10*time.Millisecond))

	require.NoError(t, process.Process.Signal(syscall.SIGCONT))
	require.Equal(t, "lost: true", pgReceive(t, "the holder is notified when it continues", lines))
	require.NoError(t, next.Unlock(pgBackground))
}

// frozenProcess holds a key, and prints how the hold ends.
func frozenProcess(t *testing.T, uri string) {
	p := pgProvider(t, uri, WithSessionTimeout(frozenTimeout))
	l, ch := pgHold(t, p, 1, "frozen")
	fmt.Println("held")
	<-ch
	fmt.Println("lost:", errors.Is(l.Cause(), ErrLockLost))
}
