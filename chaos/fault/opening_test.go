package fault

import (
	"context"
	"errors"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/preemptable/locker"
	"github.com/preemptable/locker/internal/pgserver"
)

// TestSilenceWhileOpening lets the network go silent after each of the requests with which a
// provider opens its session. Whichever of them gets no response, the caller gets an error, and
// Close returns.
func TestSilenceWhileOpening(t *testing.T) {
	t.Parallel()
	// All providers run concurrently.
	server, err := NewServer(t.Context(), map[string]string{"max_connections": "300"})
	if errors.Is(err, pgserver.ErrNoBinaries) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	target, err := url.Parse(server.URI(""))
	if err != nil {
		t.Fatal(err)
	}
	// openLink, the check of NOTIFY and the settings each have a bound of 8 s. The rest is for a
	// busy machine.
	const bound, most = 45 * time.Second, 100
	var running sync.WaitGroup
	for n := 1; n <= most; n++ {
		if n == most {
			// A provider that went silent while it created the schema keeps the others waiting.
			running.Wait()
		}
		running.Go(func() {
			proxy, err := NewProxy(target.Host)
			if err != nil {
				t.Error(err)
				return
			}
			defer proxy.Close()
			proxy.SilentAfter(n)
			provider, err := locker.NewLockProvider(locker.PostgresLockProviderKind, locker.WithPostgresBackend(uri(proxy), ""))
			if err != nil {
				t.Error(err)
				return
			}
			done := make(chan struct{})
			// The goroutine ends before the proxy is closed, or soon after.
			go func() {
				defer close(done)
				if _, err := provider.LockKey(context.Background(), "org/repo", uint(n)); err != nil && n == most {
					t.Errorf("the session needs more than %d requests: %v", n, err)
				}
				// The pause lasts into the next request, if this one got a response.
				time.Sleep(100 * time.Millisecond)
				_ = provider.(*locker.PostgresLockProvider).Close()
			}()
			select {
			case <-done:
			case <-time.After(bound):
				t.Errorf("LockKey and Close hang when request %d is not answered", n+1)
			}
		})
	}
	running.Wait()
}
