package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/gpu/helper"
	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/agent"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/libvirt"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/remote"
	"github.com/agentvm/agentvm/vm/share"
	"github.com/agentvm/agentvm/vm/template"
)

// app is the program's surroundings and the flags that every command has.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string

	directory string // -C
	name      string // -n
	json      bool   // --json, on the commands that offer it
	verbose   bool   // -v

	gpuRoot string // a test's stand-in for /, below which cards are looked for

	args  []string // as given
	named []string // variables of the user's environment that a command was told to pass on
	side  *side    // where the user is on another host

	through *elsewhere // where the machine is, if that is another host, of a command that runs here
}

// Main runs the program and returns its exit code.
func Main(args []string) int {
	// virtiofsd's namespaces are entered by this same program; that must
	// happen before anything else looks at the arguments.
	if len(args) > 1 && args[1] == share.InitArg {
		return share.InitMain()
	}
	if len(args) > 1 && args[1] == gpu.WriteArg { // a write that may block
		return gpu.WriteMain(args)
	}
	if len(args) > 1 && args[1] == gpu.ReadArg { // a look that may
		return gpu.ReadMain(args)
	}
	if len(args) > 1 && args[1] == helper.Arg { // root's, for a user whom sudo let in
		return helper.Main(args)
	}
	if len(args) > 1 && args[1] == libvirt.GuardArg { // ends QEMU with its supervisor
		return libvirt.GuardMain(args)
	}
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv, args: args[1:]}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if len(args) > 1 && args[1] == remote.Arg { // for a user on another host
		return a.serveRemote(ctx, args[2:])
	}
	return a.execute(ctx)
}

// execute runs the command line.
func (a *app) execute(ctx context.Context) int {
	root := a.rootCommand()
	root.SetArgs(a.args)
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	return a.finish(root.ExecuteContext(ctx))
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "agentvm",
		Short: "Run coding agents in virtual machines of their own",
		Long: `agentvm gives a project a virtual machine of its own and runs a coding agent in it.
The agent sees the project's directory and nothing else of this host; nothing leaves
the machine but what agentvm.yaml names.`,
		Example: `  agentvm init            # write agentvm.yaml for this project
  agentvm up              # make and start the machine
  agentvm run             # run the agent in it
  agentvm exec -- make    # run a command in it
  agentvm down            # delete the machine, keep the project`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVarP(&a.directory, "directory", "C", "", "work on the project in this directory")
	flags.StringVarP(&a.name, "name", "n", "", "the machine's name (default: the project's)")
	flags.BoolVarP(&a.verbose, "verbose", "v", false, "show what builds and starts print")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return vm.WithHint(vm.Classify(vm.ErrUsage, err), cmd.CommandPath()+" --help")
	})
	if err := root.RegisterFlagCompletionFunc("name", a.completeNames); err != nil {
		panic(err) // the flag was defined above
	}
	root.AddCommand(
		a.initCommand(), a.upCommand(), a.runCommand(), a.execCommand(), a.shellCommand(),
		a.lsCommand(), a.statusCommand(), a.logsCommand(),
		a.stopCommand(), a.startCommand(), a.restartCommand(), a.downCommand(),
		a.suspendCommand(), a.resumeCommand(), a.snapshotCommand(), a.forkCommand(),
		a.cpCommand(), a.syncCommand(), a.forwardCommand(), a.sshConfigCommand(), a.sshProxyCommand(),
		a.imageCommand(), a.templateCommand(), a.poolCommand(), a.gpuCommand(), a.agentsCommand(), a.doctorCommand(), a.versionCommand(), a.superviseCommand(),
	)
	a.lookElsewhere(root)
	return root
}

// dirs finds agentvm's directories.
func (a *app) dirs() (instance.Dirs, error) { return instance.FindDirs(a.getenv, os.Getuid()) }

// store opens the set of instances.
func (a *app) store() (instance.Store, error) {
	d, err := a.dirs()
	return instance.Store{Dirs: d}, err
}

// lookupEnv looks up a variable of the user's environment.
func (a *app) lookupEnv(name string) (string, bool) {
	if a.side != nil {
		value, ok := a.side.env[name]
		return value, ok
	}
	return os.LookupEnv(name)
}

// home is the user's home directory, or "".
func (a *app) home() string {
	home, _ := os.UserHomeDir()
	return home
}

// agents reads the shipped and the user's own agent profiles.
func (a *app) agents() (*agent.Set, error) {
	d, err := a.dirs()
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(d.Agents()); err != nil {
		return agent.Load()
	}
	return agent.Load(os.DirFS(d.Agents()))
}

// manager wires everything together for the commands that change something.
func (a *app) manager() (*lifecycle.Manager, error) {
	store, err := a.store()
	if err != nil {
		return nil, err
	}
	agents, err := a.agents()
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	known := probesIn(store.Dirs.Cache)
	return &lifecycle.Manager{
		Store: store, Probes: known, Agents: agents, Executable: exe, Home: a.home(), Pool: func() (int, error) {
			user, err := config.LoadUser(store.Dirs.UserConfig())
			return int(user.Pool), err
		},
		Templates: template.Store{Dir: store.Dirs.Templates(), Max: templatesMax},
		Hardware: func(ctx context.Context, m vm.Machine) (string, error) {
			return hardware(ctx, store.Dirs.Cache, m)
		},
		ChooseDevices: func(ctx context.Context, want config.GPU, memory int64, runAs *vm.Owner) (lifecycle.Devices, error) {
			return chooseDevices(ctx, a.gpuHost(), store.Dirs.Cache, want, memory, runAs)
		},
		RecoverDevices: func(ctx context.Context) ([]string, error) { return recoverDevices(ctx, a.gpuHost()) },
		Libvirt:        libvirtURI, Leftover: libvirtLeftover,
		Images: func() (*images.Cache, error) {
			if err := store.Dirs.Make(); err != nil {
				return nil, err
			}
			return images.Open(store.Dirs.Images(), images.WithProbes(known))
		},
		Accel: func(ctx context.Context, img *images.Image, runAs *vm.Owner) (vm.Accel, string, error) {
			return chooseAccel(ctx, store.Dirs.Cache, img, runAs)
		},
	}, nil
}

// project finds the project that the command is about.
func (a *app) project() (lifecycle.Project, error) {
	if a.side != nil {
		return a.side.project()
	}
	dir, err := a.workingDirectory()
	if err != nil {
		return lifecycle.Project{}, err
	}
	return lifecycle.FindProject(dir, a.home())
}

func (a *app) workingDirectory() (string, error) {
	if a.directory == "" || a.side != nil {
		return os.Getwd()
	}
	if fi, err := os.Stat(a.directory); err != nil {
		return "", vm.Classify(vm.ErrUsage, fmt.Errorf("-C %q: %w", a.directory, err))
	} else if !fi.IsDir() {
		return "", vm.Classify(vm.ErrUsage, fmt.Errorf("-C %q is not a directory", a.directory))
	}
	return filepath.Abs(a.directory)
}

// target finds the instance that the command is about: by a name among the
// arguments, by --name, or by the project.
func (a *app) target(args []string) (*instance.Instance, error) {
	store, err := a.store()
	if err != nil {
		return nil, err
	}
	name := a.name
	if len(args) > 0 {
		if name != "" && name != args[0] {
			return nil, vm.Classify(vm.ErrUsage, fmt.Errorf("two names: %q and %q", name, args[0]))
		}
		name = args[0]
	}
	if name != "" {
		return store.Get(name)
	}
	p, err := a.project()
	if err != nil {
		return nil, err
	}
	ws, wsErr := filepath.EvalSymlinks(p.Workspace())
	var mine []*instance.Instance
	if wsErr == nil {
		if mine, err = store.ForWorkspace(ws); err != nil {
			return nil, err
		}
	}
	if p.Config.Name != "" {
		inst, err := store.Get(p.Config.Name)
		if err != nil || len(mine) != 1 {
			return inst, err
		}
		// A fork's project has the name of what it was forked from.
		if spec, err := inst.Spec(); err == nil && spec.Workspace != ws {
			return mine[0], nil
		}
		return inst, nil
	}
	if wsErr != nil {
		return nil, vm.Classify(vm.ErrUsage, fmt.Errorf("find the workspace: %w", wsErr))
	}
	switch len(mine) {
	case 1:
		return mine[0], nil
	case 0:
		return nil, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("%s has no virtual machine", ws)), "agentvm up makes one; agentvm ls lists all")
	}
	var names []string
	for _, i := range mine {
		names = append(names, i.Name)
	}
	return nil, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%s has several virtual machines: %s", ws, strings.Join(names, ", "))), "choose one with --name")
}

// completeNames offers the names of instances.
func (a *app) completeNames(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	store, err := a.store()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	list, err := store.List()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, i := range list {
		names = append(names, i.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeOneName completes a command whose only argument is a name.
func (a *app) completeOneName(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeNames(cmd, args, word)
}

// terminal reports whether f is a terminal, and its descriptor.
func terminal(f any) (int, bool) {
	file, ok := f.(*os.File)
	return func() int {
		if ok {
			return int(file.Fd())
		}
		return -1
	}(), ok && term.IsTerminal(int(file.Fd()))
}

// printf writes to standard output; a reader that went away ends the program
// like any other.
func (a *app) printf(format string, args ...any) error {
	_, err := fmt.Fprintf(a.stdout, format, args...)
	return err
}

// noteLine writes one line for the user, beside the output.
func (a *app) noteLine(format string, args ...any) {
	fmt.Fprintf(a.stderr, "agentvm: "+format+"\n", args...)
}

// usageArgs turns cobra's complaints about arguments into wrong use.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return vm.WithHint(vm.Classify(vm.ErrUsage, err), cmd.CommandPath()+" --help")
		}
		return nil
	}
}

var errInterrupted = errors.New("interrupted")
