//go:build !unix

package pgserver

import (
	"errors"
	"os"
	"os/exec"
)

var errNoUnix = errors.New("pgserver: throwaway servers need a Unix system; set " + EnvURI + " to use a running server")

type account struct{}

func unprivileged() (*account, error)      { return nil, errNoUnix }
func (*account) own(string) error          { return errNoUnix }
func (*account) apply(*exec.Cmd)           {}
func detach(*exec.Cmd)                     {}
func stopSignal(string) (os.Signal, error) { return nil, errNoUnix }
func signalKill(int) error                 { return errNoUnix }
func signalStop(int) error                 { return errNoUnix }
func signalContinue(int) error             { return errNoUnix }
func openToAll(string) bool                { return false }
func children(int) []int                   { return nil }
