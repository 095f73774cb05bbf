// Composecheck validates Compose files like `docker compose config --quiet`, with the same parser,
// on machines without Docker. It resolves variables from the environment, so it also finds a
// mistake in a default.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/compose-spec/compose-go/v2/cli"
)

func main() {
	if err := check(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "composecheck:", err)
		os.Exit(1)
	}
}

func check(files []string) error {
	if len(files) == 0 {
		return fmt.Errorf("usage: composecheck FILE")
	}
	options, err := cli.NewProjectOptions(files, cli.WithOsEnv, cli.WithName("composecheck"))
	if err != nil {
		return err
	}
	project, err := options.LoadProject(context.Background())
	if err != nil {
		return err
	}
	for name, service := range project.Services {
		if service.Image == "" && service.Build == nil {
			return fmt.Errorf("service %s has neither an image nor a build", name)
		}
	}
	fmt.Println("ok:", files)
	return nil
}
