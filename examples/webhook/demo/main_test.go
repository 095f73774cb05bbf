package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestDemo runs the whole story in memory, with the service as a separate process.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("takes several seconds")
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	require.NoError(t, err)
	defer out.Close()
	err = run(t.Context(), false, out)
	printed, readErr := os.ReadFile(out.Name())
	require.NoError(t, readErr)
	require.NoError(t, err, "%s", printed)
	for _, part := range []string{"► runs", "! notified", "■ stopped", "← leaves", "superseded by", "→ arrives again", "× outdated      synchronize ec26c3e  too late: after closed ec26c3e", "it is not over yet", "lets the running one finish", ", has waited for", "→ arrives       review ", "↷ skipped       review ", "busy with synchronize",
		"GitHub is to show: cancelled,\nsuperseded by https://github.com/Codertocat/Hello-World/pull/", "✓ deployed", "✓ destroyed", "Every promise was kept"} {
		require.Contains(t, string(printed), part)
	}
	require.NotContains(t, string(printed), "\x1b", "colours are for terminals")
}
