package locker

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// shared is the PostgreSQL server that all tests use, each with a database of
// its own. TestMain starts and ends it.
var shared *pgserver.Instance

func TestMain(m *testing.M) {
	var err error
	if shared, err = pgserver.Shared(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "no PostgreSQL to test with:", err)
		os.Exit(1)
	}
	code := m.Run()
	if err := shared.Close(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// newDatabase makes an empty database on the shared server for one test and
// answers its URI.
func newDatabase(t testing.TB) string {
	t.Helper()
	uri, drop, err := shared.NewDatabase(context.Background())
	require.NoError(t, err)
	t.Cleanup(drop)
	return uri
}

// soon bounds every wait of a test for something that should happen; it is far
// above what it takes.
const soon = 30 * time.Second
